"""What a training step of each weight delta and block insert costs, relative to LoRA at the same targets and to PEFT.

python benchmarks/methods.py [METHOD[:option=value,…] …] [--rounds 15] [--width 1024]

Forward and backward of `minilm` on real batches of 1,024 tokens, in the machine's precision, all variants interleaved
in one process; what is printed are medians over the rounds, and medians of the ratios within a round. PEFT gets the
very adapter that we saved, on a base prepared in the same way, under the same autocast. Dropout is off for all. Ours
has the penalty of AdaLoRA in its step, PEFT's does not. With a width, the base is two BERT blocks of it, of random
weights. On one thread it is processor time that is measured, which other work on the machine hardly touches.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace

import numpy as np
import peft
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForSequenceClassification

import deltatune
from deltatune.data.batches import Batch, collate, epoch
from deltatune.data.tokens import tokenize
from deltatune.methods import METHODS, OverLayers, make, parse
from deltatune.training.attention import choose_attention
from deltatune.training.precision import autocast, prepare, resolve

LABELS = ("rotten", "fresh")
KINDS = ("weight delta", "block insert")
FITTING = {"vblora": {"vector_length": 192}, "adapterfusion": {"parts": ({}, {})}}
"""Options without which a method does not fit the widths of `minilm`."""


def fresh(width: int) -> nn.Module:
    """The base as a classifier without dropout, so that variants differ in their adapters alone; 0 is `minilm`."""
    model = deltatune.load("minilm", labels=LABELS).model
    if width:
        shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
        model.config.update({**shape, "num_hidden_layers": 2})
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(model.config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    choose_attention(model, 256)
    return model


def ours(method: OverLayers, precision: str, width: int) -> nn.Module:
    """Our adapter on the base, ready to train."""
    model = deltatune.attach(fresh(width), method)
    prepare(model, precision)
    return model.train()


def theirs(method: OverLayers, precision: str, width: int) -> nn.Module:
    """PEFT's adapter of the same shape on the base, ready to train."""
    with tempfile.TemporaryDirectory() as folder:
        deltatune.save_adapter(deltatune.attach(fresh(width), method), folder)
        model = fresh(width)
        if precision == "bf16":
            model = model.bfloat16()
        return peft.PeftModel.from_pretrained(model, folder, is_trainable=True).train()


def step(model: nn.Module, batch: Batch, precision: str) -> float:
    """Milliseconds of one forward and backward pass; on one thread of processor time."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    with autocast(precision, torch.device("cpu")):
        logits = model(**batch.inputs).logits
    loss = F.cross_entropy(logits.float(), batch.labels)
    if (extra := deltatune.penalty(model)) is not None:
        loss = loss + extra
    loss.backward()
    took = 1000 * (clock() - began)
    model.zero_grad()
    return took


def main() -> None:
    """Measures what the command line names, or every registered weight delta and block insert."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("methods", nargs="*", metavar="METHOD")
    options.add_argument("--rounds", type=int, default=15, help="a multiple of 3 gives each variant each place")
    options.add_argument("--targets", default="", help="left out, each method's own")
    options.add_argument("--width", type=int, default=0, help="of a random base of two blocks, in place of minilm")
    given = options.parse_args()
    names = given.methods or [name for name, kind in METHODS.items() if kind.kind in KINDS and name != "lora"]

    precision = resolve("auto")
    data = deltatune.load_data("rotten-tomatoes").limited(train=2000, validation=10, test=10, seed=0)
    tokens = tokenize(data.train, deltatune.load("minilm", labels=LABELS).tokenizer, 256)
    batches = [collate(tokens, places, 0) for places in epoch(tokens.lengths, 1024, np.random.default_rng(0))]
    print(f"{precision}, {torch.get_num_threads()} threads, torch {torch.__version__}, peft {peft.__version__}")
    print(f"{'method':44} {'ms':>7} {'of LoRA':>8} {'PEFT ms':>8} {'of PEFT':>8}")
    for words in names:
        name, chosen = parse(words)
        method = make(name, {**FITTING.get(name, {}), **chosen})
        targets = given.targets or method.targets  # of an insert the layers that it is over, which LoRA then adapts
        method = replace(method, targets=targets)
        lora = make("lora", {"targets": targets})
        variants = {kind: ours(one, precision, given.width) for kind, one in (("lora", lora), ("ours", method))}
        if not method.peft_type.startswith("DELTATUNE"):
            variants["peft"] = theirs(method, precision, given.width)
        times: dict[str, list[float]] = {variant: [] for variant in variants}
        for number in range(given.rounds + 2):
            first = number % len(variants)  # changes: the step before leaves its traces in the caches
            for variant, model in [*variants.items(), *variants.items()][first : first + len(variants)]:
                took = step(model, batches[number % len(batches)], precision)
                if number >= 2:  # two rounds of warming up
                    times[variant].append(took)
        mine = statistics.median(times["ours"])
        of_lora = statistics.median(a / b for a, b in zip(times["ours"], times["lora"], strict=True))
        line = f"{words:44} {mine:7.0f} {of_lora:8.2f}"
        if "peft" in times:
            of_peft = statistics.median(a / b for a, b in zip(times["ours"], times["peft"], strict=True))
            line += f" {statistics.median(times['peft']):8.0f} {of_peft:8.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
