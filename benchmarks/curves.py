"""Whether a run learns with the fast pieces as it does without any: LoRA on both embedded tasks, several seeds.

python benchmarks/curves.py [--base minilm smollm2] [--seeds 3]

Both runs of a seed see the same batches in the same order. Printed are the validation losses, how far both runs are
apart at the same seed, and how far seeds are apart without the pieces, which is what chance does to a run anyway.
"""

import argparse
import statistics

import deltatune
from deltatune import LoRA, Training
from deltatune.models.base import tasks
from deltatune.models.places import find_base
from deltatune.training.events import Step
from deltatune.training.pieces import PIECES, Piece


def run(name: str, plain: tuple[Piece, ...], seed: int) -> tuple[list[float], float]:
    """The training losses of a run, and the validation loss at its end."""
    writes = "generation" in tasks(find_base(name))
    data = deltatune.load_data("docstrings" if writes else "rotten-tomatoes").limited(
        240 if writes else 1600, 200, 10, seed=0
    )
    base = deltatune.load(name, labels=data.labels, seed=seed)
    settings = Training(epochs=1, batch_tokens=616 if writes else 1024, evaluations=1, keep="last", plain=plain)
    losses: list[float] = []
    tuned = deltatune.tune(
        base,
        data,
        LoRA(),
        settings,
        seed=seed,
        listen=lambda event: losses.append(event.loss) if isinstance(event, Step) else None,
    )
    return losses, tuned.validation.loss


def main() -> None:
    """Trains and prints."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--base", nargs="+", default=["minilm", "smollm2"])
    options.add_argument("--seeds", type=int, default=3)
    chosen = options.parse_args()
    for name in chosen.base:
        ends: dict[bool, list[float]] = {True: [], False: []}
        apart: list[float] = []
        for seed in range(chosen.seeds):
            curves = {}
            for fast in (True, False):
                curves[fast], end = run(name, () if fast else PIECES, seed)
                ends[fast].append(end)
            ours, theirs = (statistics.fmean(curves[fast][-20:]) for fast in (True, False))  # single steps tell little
            apart.append(ours - theirs)
            last = " and ".join(f"{ends[fast][-1]:.4f}" for fast in (True, False))
            print(f"{name}, seed {seed}: {len(curves[True])} steps, validation loss {last}", flush=True)
        gaps = [ours - theirs for ours, theirs in zip(ends[True], ends[False], strict=True)]
        print(
            f"{name}: with the pieces − without: validation {statistics.fmean(gaps):+.4f} (largest "
            f"{max(map(abs, gaps)):.4f}), last 20 steps {statistics.fmean(apart):+.4f}; seeds differ without them by "
            f"{statistics.stdev(ends[False]):.4f} (standard deviation)"
        )


if __name__ == "__main__":
    main()
