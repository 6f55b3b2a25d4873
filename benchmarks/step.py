"""What some choices of the training step are worth on this machine: medians of ratios, the variants interleaved.

python benchmarks/step.py
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

import deltatune
from deltatune import LoRA
from deltatune.data.batches import collate, epoch
from deltatune.data.sequences import UNSCORED, Sequences
from deltatune.data.tokens import tokenize
from deltatune.dropout import dropout, replace_dropout
from deltatune.models import short_attention
from deltatune.training.language import LanguageModelling
from deltatune.training.precision import autocast, prepare, resolve


def compare(name: str, plain: Callable[[], object], ours: Callable[[], object], rounds: int) -> None:
    """Prints the median time of both and the median of their ratios, two rounds of warming up left out."""
    times = []
    for _ in range(rounds + 2):
        pair = []
        for run in (plain, ours):
            began = time.perf_counter()
            run()
            pair.append(1000 * (time.perf_counter() - began))
        times.append(pair)
    before, after = zip(*times[2:], strict=True)
    ratio = statistics.median(b / a for b, a in times[2:])
    print(f"{name}: {statistics.median(before):.1f} ms → {statistics.median(after):.1f} ms, ratio {ratio:.2f}")


x = torch.randn(1024, 384).bfloat16()
compare("dropout of 1,024 × 384, PyTorch's → from random bits", lambda: F.dropout(x, 0.1), lambda: dropout(x, 0.1), 60)

data = deltatune.load_data("rotten-tomatoes").limited(train=1000, validation=10, test=10, seed=0)
base = deltatune.load("minilm", labels=data.labels)
precision = resolve("auto")
model = deltatune.attach(base.model, LoRA())
prepare(model, precision)
replace_dropout(model)
model.train()
tokens = tokenize(data.train, base.tokenizer, 256)
batches = [collate(tokens, places, 0) for places in epoch(tokens.lengths, 1024, np.random.default_rng(0))]
turn = dict.fromkeys(("sdpa", "eager", short_attention.NAME), 0)


def step(attention: str) -> None:
    """One forward and backward pass of LoRA on the next batch."""
    model.set_attn_implementation(attention)
    batch = batches[turn[attention] % len(batches)]
    turn[attention] += 1
    with autocast(precision, torch.device("cpu")):
        logits = model(**batch.inputs).logits
    F.cross_entropy(logits.float(), batch.labels).backward()
    model.zero_grad()


for plain, ours in (("sdpa", "eager"), ("eager", short_attention.NAME)):
    compare(f"LoRA step in {precision}, {plain} → {ours}", lambda a=plain: step(a), lambda a=ours: step(a), 25)

kind = torch.bfloat16 if precision == "bf16" else torch.float32
for length in (128, 256, 512, 1024, 2048):
    tensors = [torch.randn(max(1, 1024 // length), 9, length, 64).to(kind).requires_grad_() for _ in range(3)]
    bias = torch.full((length, length), -torch.inf, dtype=kind).triu(1)[None, None]

    def fused(tensors: list[torch.Tensor] = tensors) -> None:
        """Both passes of PyTorch's attention, each token seeing those before it."""
        F.scaled_dot_product_attention(*tensors, is_causal=True).sum().backward()

    def own(tensors: list[torch.Tensor] = tensors, bias: torch.Tensor = bias) -> None:
        """The same of ours."""
        short_attention.attend(torch.nn.Module(), *tensors, bias)[0].sum().backward()

    compare(f"attention of {len(tensors[0])} × {length} tokens, sdpa → {short_attention.NAME}", fused, own, 10)

base = deltatune.load("smollm2")
del base.model.model.layers[6:]
deltatune.attach(base.model, LoRA())
prepare(base.model, precision)
base.model.train()
task = LanguageModelling(base, precision)
rows = torch.randint(1000, 49_000, (8, 128), generator=torch.Generator().manual_seed(0)).tolist()
batch = task.collate(Sequences(tuple(rows), tuple([UNSCORED] * 96 + row[96:] for row in rows), 0), range(8))


def decoder_step(attention: str) -> None:
    """One forward and backward pass of a decoder with grouped queries."""
    base.model.set_attn_implementation(attention)
    task.backward(batch, batch.units)
    base.model.zero_grad()


for plain, ours in (("sdpa", "eager"), ("eager", short_attention.NAME)):
    compare(
        f"LoRA step of six layers of smollm2 at 8 × 128, {plain} → {ours}",
        lambda a=plain: decoder_step(a),
        lambda a=ours: decoder_step(a),
        12,
    )
