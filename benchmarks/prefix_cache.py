"""What the frozen-prefix cache is worth: a step of last-k after the first epoch against one of LoRA on all layers.

python benchmarks/prefix_cache.py [--rounds 20] [--on disk] [--shape minilm] [--shape decoder] [--shape encoder-decoder]

Medians of ratios within a round; the variants take turns at being first. `minilm` is the embedded base; the other
shapes have random weights: six blocks of its width, and six twice. A step is a whole one: batch, forward, backward,
AdamW.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from itertools import cycle

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

import deltatune
from deltatune import LastK, LoRA
from deltatune.data.batches import collate, epoch
from deltatune.data.tokens import tokenize
from deltatune.dropout import replace_dropout
from deltatune.methods import Method
from deltatune.models.attach import trainable_parameters
from deltatune.training.attention import choose_attention
from deltatune.training.precision import autocast, prepare, resolve
from deltatune.training.prefix import Prefix

LABELS = ("rotten", "fresh")
SHAPES = {
    "minilm": None,
    "decoder": ("gpt2", {"n_embd": 384, "n_layer": 6, "n_head": 12}),
    "encoder-decoder": ("t5", {"d_model": 384, "d_ff": 1536, "num_layers": 6, "num_heads": 12, "d_kv": 32}),
}
PRECISION = resolve("auto")

options = argparse.ArgumentParser()
options.add_argument("--rounds", type=int, default=20)
options.add_argument("--on", choices=("memory", "disk"), default="memory")
options.add_argument("--shape", choices=SHAPES, action="append")
given = options.parse_args()

data = deltatune.load_data("rotten-tomatoes").limited(train=1000, validation=10, test=10, seed=0)
tokenizer = deltatune.load("minilm", labels=LABELS).tokenizer
tokens = tokenize(data.train, tokenizer, 256)
batches = epoch(tokens.lengths, 1024, np.random.default_rng(0))[:12]


def fresh(shape: str) -> PreTrainedModel:
    """A classifier of that shape."""
    if SHAPES[shape] is None:
        return deltatune.load("minilm", labels=LABELS).model
    kind, sizes = SHAPES[shape]
    special = {"pad_token_id": 0, "eos_token_id": 102, "decoder_start_token_id": 0}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), num_labels=2, **special, **sizes)
    return AutoModelForSequenceClassification.from_config(config)


def steps(shape: str, method: Method, budget: int) -> Iterator[None]:
    """Whole training steps, one each time it is advanced, on the same batches over and over."""
    model = deltatune.attach(fresh(shape), method)
    prepare(model, PRECISION)
    replace_dropout(model)
    choose_attention(model, 256)
    model.train()
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-4, fused=True)
    prefix = Prefix(model, budget, given.on)

    def logits(batch) -> torch.Tensor:
        with autocast(PRECISION, torch.device("cpu")):
            return model(**batch.inputs).logits

    prefix.freeze(lambda: logits(collate(tokens, batches[0][:1], 0)))
    for places in cycle(batches):
        batch = collate(tokens, places, 0)
        with prefix.standing_in(batch.indices):
            out = logits(batch)
        F.cross_entropy(out.float(), batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def timed(variant: Iterator[None]) -> float:
    """Milliseconds of one step."""
    began = time.perf_counter()
    next(variant)
    return 1000 * (time.perf_counter() - began)


print(f"{torch.get_num_threads()} threads, {PRECISION}, kept in {given.on}, {given.rounds} rounds")
for shape in given.shape or SHAPES:
    variants = {
        "lora (r=8, all-linear)": steps(shape, LoRA(), 0),
        "last-k (k=2)": steps(shape, LastK(k=2), 0),
        "last-k (k=2), cached": steps(shape, LastK(k=2), 10**9),
    }
    for variant in variants.values():  # the first epoch, and a little of the second
        for _ in range(len(batches) + 1):
            next(variant)
    rounds = []
    for turn in range(given.rounds):
        names = list(variants)
        order = names[turn % 3 :] + names[: turn % 3]
        took = {name: timed(variants[name]) for name in order}
        rounds.append([took[name] for name in names])
    lora, plain, cached = zip(*rounds, strict=True)
    for name, times in zip(variants, (lora, plain, cached), strict=True):
        ratios = [a / b for a, b in zip(lora, times, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        times, ratio = statistics.median(times), statistics.median(ratios)
        print(f"{shape}: {name}: {times:.0f} ms, {ratio:.2f} times as fast as lora (quartiles {low:.2f} to {high:.2f})")
