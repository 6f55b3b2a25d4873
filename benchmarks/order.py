"""What the order of the examples alone is worth in the race on MiniLM: each peer with random batches and with ours.

python benchmarks/order.py [--seeds 3]

Printed is the validation loss after the race's steps. Transformers' Trainer as taught takes random batches of 32, all
others in the race those of `deltatune.tune`, which are of like length and of as many tokens.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from race import trainer, works
from race.contestants import contestant


class Alone:
    """In the place of `Turn`: nobody else races."""

    quality: dict[str, float]

    def done(self, **_: Any) -> None:
        """Goes on with the next step."""

    def say(self, **facts: Any) -> None:
        """Keeps what is said at the end."""
        self.quality = facts["quality"]


def main() -> None:
    """Trains and prints."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=3, help="seeds of the tuned entry with random batches")
    chosen = options.parse_args()
    taught, tuned = contestant("minilm", "trainer"), contestant("minilm", "peft")
    entries = [(replace(taught, same_batches=True), 0), (tuned, 0)]
    entries += [(replace(tuned, same_batches=False), seed) for seed in range(chosen.seeds)] + [(taught, 0)]
    with tempfile.TemporaryDirectory() as folder:
        work = {**works.write("minilm", Path(folder), quick=False), "folder": folder}
        for entry, seed in entries:
            turn = Alone()
            trainer.run({**work, "seed": seed}, entry, turn)  # type: ignore[arg-type]
            order = "our batches" if entry.same_batches else f"random batches, seed {seed}"
            found = ", ".join(f"{name} {value:.3f}" for name, value in turn.quality.items())
            print(f"{entry.what}; {order}: {found}", flush=True)


if __name__ == "__main__":
    main()
