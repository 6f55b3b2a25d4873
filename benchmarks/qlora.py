"""QLoRA against LoRA over the same base in bf16, and against PEFT with bitsandbytes: steps, memory, loading.

OMP_NUM_THREADS=1 python benchmarks/qlora.py [--base smollm2 minilm] [--layers 30] [--rounds 15]

Bases are `minilm`, a classifier on real batches of 1,024 tokens, `smollm2` on 8 × 128 random tokens, and `decoder`, the
configuration of the latter with random weights and as many layers as are asked for. Each trains r = 8 on all its linear
layers without dropout, over nf4 with double quantisation, and is given the same attention and autocast; steps are
forward and backward passes, interleaved in one process. That it is the same work is checked: as many parameters train,
and the losses agree. Memory is the peak of a fresh process (VmHWM) that runs `deltatune tune` on a few batches of the
reviews; loading is from a file in bf16, interleaved. For both a language model gets a classifier's head.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import peft
import torch
from storage import Batch, interleaved, real_batches, table
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedModel,
)

import deltatune
from deltatune import LoRA
from deltatune.models.base import quiet
from deltatune.models.quantise import read_storages
from deltatune.models.streaming import StorageConfig
from deltatune.training.attention import choose_attention
from deltatune.training.precision import autocast, prepare

BASES = ("decoder", "minilm", "smollm2")
VARIANTS = ("LoRA", "QLoRA", "PEFT")
LABELS = ("rotten", "fresh")
VOCABULARY = 49152
Rows = list[dict[str, object]]


def write(base: str, layers: int, folder: Path) -> Path:
    """Writes a base to a folder, in bf16, with a tokenizer."""
    torch.manual_seed(0)
    embedded = deltatune.load("minilm", labels=LABELS)
    embedded.tokenizer.save_pretrained(folder)
    if base == "minilm":
        model = embedded.model
    elif base == "smollm2":
        model = deltatune.load("smollm2").model
    else:
        config = LlamaConfig(
            hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
            num_key_value_heads=3, vocab_size=VOCABULARY, tie_word_embeddings=True, pad_token_id=0,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
    model.bfloat16().save_pretrained(folder)
    return folder


def loaded(variant: str, base: str, folder: Path) -> PreTrainedModel:
    """The base as that variant trains over it, without its adapter; quantised weight by weight as it is read."""
    auto = AutoModelForSequenceClassification if base == "minilm" else AutoModelForCausalLM
    options: dict[str, object] = {}
    if variant == "QLoRA":
        options["quantization_config"] = StorageConfig(read_storages("nf4"))
    if variant == "PEFT":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["classifier", "lm_head"],  # it means 4 bits, too
        )
    with quiet():
        return auto.from_pretrained(folder, dtype=torch.bfloat16, **options)


def ready(variant: str, base: str, folder: Path) -> nn.Module:
    """The base with its adapter, ready to train."""
    model = loaded(variant, base, folder)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    choose_attention(model, 256)
    if variant == "PEFT":
        task = "SEQ_CLS" if base == "minilm" else "CAUSAL_LM"
        config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type=task)
        return peft.get_peft_model(model, config).train()
    model = deltatune.attach(model, LoRA(rank=8, alpha=16))
    prepare(model, "bf16")
    return model.train()


def batches_of(base: str) -> list[Batch]:
    """Batches of about 1,024 tokens."""
    if base == "minilm":
        return real_batches()
    ids = torch.randint(1, VOCABULARY, (8, 128), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": ids}]


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss, under the autocast of all variants."""
    with autocast("bf16", torch.device("cpu")):
        loss: torch.Tensor = model(**batch).loss
    return loss


def check_same_work(models: Mapping[str, nn.Module], batch: Batch) -> None:
    """Ends the measurement where something else would be compared than what is claimed."""
    trained = {name: sum(p.numel() for p in model.parameters() if p.requires_grad) for name, model in models.items()}
    losses = {name: loss_of(model, batch).item() for name, model in models.items()}
    print(f"parameters that train {trained}\nlosses {losses}", flush=True)
    assert len(set(trained.values())) == 1, trained
    assert abs(losses["QLoRA"] - losses["PEFT"]) < 0.01 * losses["PEFT"], losses


def compared(times: Mapping[str, list[float]], of: str, to: str) -> str:
    """The median of the ratios within a round and its quartiles."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(times[of], times[to], strict=True)], n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def rows(times: Mapping[str, list[float]], base: str) -> Rows:
    """Medians, and QLoRA's ratios."""
    return [
        {
            "base": base,
            **{f"{name}, ms": round(statistics.median(every)) for name, every in times.items()},
            **{f"QLoRA of {name}": compared(times, "QLoRA", name) for name in times if name != "QLoRA"},
        }
    ]


def steps(base: str, folder: Path, rounds: int) -> Rows:
    """A step of each variant."""
    batches = batches_of(base)
    models = {name: ready(name, base, folder) for name in VARIANTS}
    check_same_work(models, batches[0])
    turns = {name: iter(batches * (2 * rounds + 2)) for name in VARIANTS}

    def step(name: str) -> None:
        loss_of(models[name], next(turns[name])).backward()
        models[name].zero_grad()

    return rows(interleaved({name: lambda name=name: step(name) for name in VARIANTS}, rounds), base)


def loading(base: str, folder: Path, rounds: int) -> Rows:
    """Loading the base from its folder as runs do it, as it is and quantised; and with bitsandbytes, for PEFT."""
    runs = {
        "LoRA": lambda: deltatune.load(str(folder), labels=LABELS),
        "QLoRA": lambda: deltatune.load(str(folder), labels=LABELS, storage="nf4"),
        "PEFT": lambda: loaded("PEFT", base, folder),
    }
    return rows(interleaved(runs, rounds), base)


def memory(base: str, folder: Path) -> Rows:
    """Peak memory of `deltatune tune` in bf16 over the base as it is and in nf4, beside the bytes of its weights."""
    found = []
    for name, storage in (("LoRA", ""), ("QLoRA", "nf4")):
        with tempfile.TemporaryDirectory() as place:
            words = ["tune", "--base", folder, "--storage", storage, "--precision", "bf16", "--out", f"{place}/out"]
            limits = ["--train", 200, "--validation", 10, "--test", 10, "--epochs", 1]
            command = [sys.executable, "-c", "from deltatune.cli.main import main; main()", *words, *limits, "--json"]
            done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
        model = deltatune.load(str(folder), labels=LABELS, dtype=torch.bfloat16, storage=storage).model
        held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        found.append((name, json.loads(done.stdout)["peak_bytes"], held))
    [(_, most, whole), (_, less, packed)] = found
    return [
        {
            "base": base,
            "run": name,
            "peak MB": round(peak / 1e6),
            "weights MB": round(held / 1e6),
            "less, of the bytes saved": f"{(most - less) / (whole - packed):.2f}",
        }
        for name, peak, held in found
    ]


def main() -> None:
    """Measures and prints the tables."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--base", nargs="+", choices=BASES, default=("smollm2", "minilm"))
    options.add_argument("--layers", type=int, default=30, help="of the decoder; SmolLM2-135M has 30")
    options.add_argument("--rounds", type=int, default=15, help="a multiple of 3 gives each variant each place")
    given = options.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, peft {peft.__version__}")
    for base in given.base:
        with tempfile.TemporaryDirectory() as place:
            folder = write(base, given.layers, Path(place))
            print("\nA step")
            table(steps(base, folder, given.rounds))
            print("\nMemory of a fresh process")
            table(memory(base, folder))
            print("\nLoading")
            table(loading(base, folder, 3))


if __name__ == "__main__":
    main()
