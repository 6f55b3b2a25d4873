"""What storing a base in fewer bits costs and brings: bits, error, decoding, and QLoRA's step as a multiple of LoRA's.

python benchmarks/storage.py [--rounds 20] [--layers 8] [--json FILE]

Bits are counted from the bytes in memory, errors are of Gaussian weights. Steps are forward and backward passes of LoRA
on all linear layers in the machine's precision, the bases interleaved in one process: `minilm` on real batches of 1,024
tokens, and a random decoder of SmolLM2-135M's width with fewer layers on 8 × 128 tokens. Printed are medians over the
rounds, and medians of the ratios within a round. OMP_NUM_THREADS=1 tells more where other work runs beside.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

import deltatune
from deltatune import LoRA
from deltatune.data.batches import collate, epoch
from deltatune.data.tokens import tokenize
from deltatune.training.attention import choose_attention
from deltatune.training.precision import autocast, prepare, resolve
from deltatune.weights import QuantisedLinear, parse_storage, weight_of

FORMATS = ("nf4", "nf4:double=false", "fp4", "nf3", "nf2", "int8", "int8:block=4096", "bf16")
STEPS = ("nf4", "nf4:double=false", "int8")
Batch = Mapping[str, torch.Tensor]


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each run in every round, two rounds of warming up left out; each takes a turn at being first."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        first = number % len(runs)
        for name, run in [*runs.items(), *runs.items()][first : first + len(runs)]:
            began = time.perf_counter()
            run()
            if number >= 2:
                times[name].append(1000 * (time.perf_counter() - began))
    return times


def ratio(times: Mapping[str, list[float]], of: str, to: str) -> float:
    """The median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(times[of], times[to], strict=True))


def formats(rounds: int) -> list[dict[str, object]]:
    """Bits, error and the time of decoding one 1536 × 576 weight, as a share of its product with 1,024 tokens."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[resolve("auto")]
    plain = nn.Linear(576, 1536, bias=False)
    nn.init.normal_(plain.weight)
    x, dense = torch.randn(1024, 576).to(dtype), plain.weight.detach().to(dtype)
    found, runs = {}, {"product": lambda: x @ dense.T}
    for words in FORMATS:
        began = time.process_time()
        layer = QuantisedLinear.of(plain, parse_storage(words))
        encoding = (time.process_time() - began) / plain.weight.numel()
        weight = weight_of(layer)
        error = ((weight.dense().float() - plain.weight).norm() / plain.weight.norm()).item()
        found[words] = {"bits": 8 * weight.nbytes / plain.weight.numel(), "error": error, "encoding_ns": 1e9 * encoding}
        runs[words] = lambda weight=weight: weight._transient(dtype)
    if find_spec("bitsandbytes"):
        runs["bitsandbytes"] = bitsandbytes(plain.weight.detach().to(dtype))
    times = interleaved(runs, 5 * rounds)
    rows = [
        {"storage": words, **row, "decoding_of_product": ratio(times, words, "product")} for words, row in found.items()
    ]
    if "bitsandbytes" in runs:
        share = ratio(times, "bitsandbytes", "product")
        print(f"bitsandbytes decodes nf4 without double quantisation in {share:.3f} of the product's time")
    return rows


def bitsandbytes(weight: torch.Tensor) -> Callable[[], object]:
    """Decoding of nf4 by bitsandbytes' kernel."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight, quant_type="nf4")
    return lambda: dequantize_4bit(codes, state)


def ready(model: nn.Module, storage: str) -> nn.Module:
    """The model with LoRA over its base in that storage, without dropout, ready to train."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model = deltatune.attach(deltatune.quantise(model, storage) if storage else model, LoRA())
    prepare(model, resolve("auto"))
    choose_attention(model, 256)
    return model.train()


def steps(make: Callable[[], nn.Module], batches: list[Batch], rounds: int, base: str) -> list[dict[str, object]]:
    """The step over each storage as a multiple of the step over the plain base."""
    turns = {storage: iter(batches * rounds * 2) for storage in ("", *STEPS)}
    models = {storage: ready(make(), storage) for storage in turns}

    def step(storage: str) -> None:
        with autocast(resolve("auto"), torch.device("cpu")):
            loss = models[storage](**next(turns[storage])).loss
        loss.backward()
        models[storage].zero_grad()

    times = interleaved({storage: lambda storage=storage: step(storage) for storage in turns}, rounds)
    return [
        {
            "base": base,
            "storage": storage or "plain",
            "ms": statistics.median(times[storage]),
            "of_plain": ratio(times, storage, ""),
            "base_megabytes": sum(t.nbytes for t in (*model.parameters(), *model.buffers())) / 1e6,
        }
        for storage, model in models.items()
    ]


def real_batches() -> list[Batch]:
    """Batches of 1,024 tokens of the reviews, with labels."""
    data = deltatune.load_data("rotten-tomatoes").limited(train=1000, validation=10, test=10, seed=0)
    tokens = tokenize(data.train, deltatune.load("minilm", labels=data.labels).tokenizer, 256)
    made = [collate(tokens, places, 0) for places in epoch(tokens.lengths, 1024, np.random.default_rng(0))]
    return [{**batch.inputs, "labels": batch.labels} for batch in made]


def decoder(layers: int) -> nn.Module:
    """A random decoder of SmolLM2-135M's width."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=1000,
        pad_token_id=0,
        num_labels=2,
    )
    return AutoModelForSequenceClassification.from_config(config)


def table(rows: list[dict[str, object]]) -> None:
    """Prints rows as Markdown."""
    print("\n| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print(
            "| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()) + " |", flush=True
        )


def main() -> None:
    """Measures and prints three tables."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--layers", type=int, default=8, help="of the decoder; SmolLM2-135M has 30")
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    torch.manual_seed(0)
    print(f"{resolve('auto')}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    found = {"formats": formats(given.rounds)}
    table(found["formats"])
    ids = {"input_ids": torch.randint(1, 1000, (8, 128)), "labels": torch.zeros(8, dtype=torch.long)}
    found["decoder"] = steps(lambda: decoder(given.layers), [ids], given.rounds, f"decoder, {given.layers} layers")
    table(found["decoder"])
    labels = ("rotten", "fresh")
    found["minilm"] = steps(
        lambda: deltatune.load("minilm", labels=labels).model, real_batches(), given.rounds, "minilm"
    )
    table(found["minilm"])
    if given.json:
        given.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
