"""What each fast piece of a step is worth: LoRA with all of them, and with each left out, in turn in one process.

python benchmarks/pieces.py [--base minilm smollm2] [--rounds 15]

Forward and backward passes of the same batches of 1,024 tokens, grouped by length, in the machine's precision. Printed
are the medians of the ratios within a round, with quartiles: above 1 the step is slower without the piece.
"""

import argparse
import statistics
import time

import numpy as np
import torch

import deltatune
from deltatune.data.batches import epoch
from deltatune.models.base import tasks
from deltatune.models.places import find_base
from deltatune.training.pieces import PIECES, Piece, quicken
from deltatune.training.pooled import pooled
from deltatune.training.precision import prepare, resolve
from deltatune.training.tasks import task_for


class Contestant:
    """A base with LoRA, without one of the pieces or with all of them."""

    def __init__(self, name: str, plain: tuple[Piece, ...]) -> None:
        writes = "generation" in tasks(find_base(name))
        data = deltatune.load_data("docstrings" if writes else "rotten-tomatoes").limited(1600, 10, 10, seed=0)
        base = deltatune.load(name, labels=data.labels)
        deltatune.attach(base.model, deltatune.LoRA())
        precision = resolve("auto")
        prepare(base.model, precision)
        quicken(base.model, 256, plain)
        base.model.train()
        self.task = task_for(base, precision, plain)
        self.examples = self.task.encode(data.train, 256)
        self.batches = epoch(self.examples.lengths, 1024, np.random.default_rng(0))
        several = self.task.collate(self.examples, self.batches[0][:4])
        self._pooled = pooled(base.model, lambda: self.task.run(several), "pooled" not in plain)
        self._pooled.__enter__()

    def step(self, number: int) -> float:
        """Seconds of a step."""
        batch = self.task.collate(self.examples, self.batches[number % len(self.batches)])
        began = time.perf_counter()
        self.task.backward(batch, batch.units)
        took = time.perf_counter() - began
        self.task.model.zero_grad()
        return took


def main() -> None:
    """Measures and prints."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--base", nargs="+", default=["minilm", "smollm2"])
    options.add_argument("--rounds", type=int, default=15)
    chosen = options.parse_args()
    for name in chosen.base:
        contestants = {"": Contestant(name, ()), **{piece: Contestant(name, (piece,)) for piece in PIECES}}
        rounds: list[dict[str, float]] = []
        for number in range(chosen.rounds + 2):
            order = [*contestants][number % len(contestants) :] + [*contestants][: number % len(contestants)]
            rounds.append({piece: contestants[piece].step(number) for piece in order})  # nobody is always the first
        whole = statistics.median(times[""] for times in rounds[2:])
        print(f"{name}, {torch.get_num_threads()} threads: a step {1000 * whole:.0f} ms")
        for piece in PIECES:
            low, middle, high = statistics.quantiles([times[piece] / times[""] for times in rounds[2:]], n=4)
            print(f"  without {piece}: {middle:.2f} ({low:.2f}–{high:.2f})")


if __name__ == "__main__":
    main()
