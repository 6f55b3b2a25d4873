"""What the loss at scored positions in chunks spares: peak memory and time of a step, against all logits at once.

python benchmarks/scored_loss.py [--base smollm2] [--examples 8] [--length 128] [--share 0.25] [--steps 5]

LoRA on random tokens of which the last `--share` is scored, each variant in a process of its own: `chunked` is our
loop's loss, `full` the one that Transformers computes from all logits. Printed are each process's peak resident memory,
the same less its memory before the first step, the median time of a step, and the loss, which is the same.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch

import deltatune
from deltatune.data.batches import collate_sequences
from deltatune.data.sequences import UNSCORED, Sequences
from deltatune.training.attention import choose_attention
from deltatune.training.language import LanguageModelling
from deltatune.training.memory import peak, resident
from deltatune.training.precision import autocast, prepare, resolve


def measure(chosen: argparse.Namespace) -> dict[str, float]:
    """One variant in this process."""
    base = deltatune.load(chosen.base, dtype=torch.bfloat16 if resolve("auto") == "bf16" else torch.float32)
    deltatune.attach(base.model, deltatune.LoRA())
    prepare(base.model, resolve("auto"))
    choose_attention(base.model, chosen.length)
    base.model.train()
    rows = torch.randint(
        base.model.config.vocab_size, (chosen.examples, chosen.length), generator=torch.Generator().manual_seed(0)
    ).tolist()
    read = chosen.length - round(chosen.share * chosen.length)
    targets = tuple([UNSCORED] * read + row[read:] for row in rows)
    batch = collate_sequences(Sequences(tuple(rows), targets, 0), range(chosen.examples), 0)
    task = LanguageModelling(base, resolve("auto"))
    before, took, loss = resident(), [], 0.0
    for _ in range(chosen.steps):
        began = time.perf_counter()
        if chosen.variant == "chunked":
            loss = task.backward(batch, batch.units)
        else:
            with autocast(resolve("auto"), base.model.device):
                whole = base.model(**batch.inputs, labels=batch.labels).loss
            whole.backward()
            loss = whole.item()
        base.model.zero_grad()
        took.append(time.perf_counter() - began)
    return {"peak": peak(), "before": before, "seconds": statistics.median(took), "loss": loss}


def main() -> None:
    """Measures every variant, or the one that is named in this process."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--base", default="smollm2")
    options.add_argument("--examples", type=int, default=8)
    options.add_argument("--length", type=int, default=128)
    options.add_argument("--share", type=float, default=0.25)
    options.add_argument("--steps", type=int, default=5)
    options.add_argument("--variant", choices=("full", "chunked"), help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.variant:
        print(json.dumps(measure(chosen)))
        return
    print(f"{torch.get_num_threads()} threads, {resolve('auto')}, {chosen.examples} × {chosen.length} tokens")
    found = {}
    for variant in ("full", "chunked"):
        words = [sys.executable, *sys.argv, "--variant", variant]
        found[variant] = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        one = found[variant]
        print(
            f"{variant}: peak {one['peak'] / 1e6:,.0f} MB, the steps {(one['peak'] - one['before']) / 1e6:,.0f} MB, "
            f"{one['seconds']:.2f} s a step, loss {one['loss']:.4f}"
        )
    less = 1 - found["chunked"]["peak"] / found["full"]["peak"]
    print(f"chunked has a peak {less:.0%} lower")


if __name__ == "__main__":
    main()
