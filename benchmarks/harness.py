"""What a cell of a comparison costs beyond the training, testing and saving that anybody does who tunes.

OMP_NUM_THREADS=1 python benchmarks/harness.py [--rounds 3] [--method lora] [--train 1600] [--epochs 2]

`bare` reads the data, loads `minilm`, tunes it, tests it and saves the adapter; `cell` is one cell of a comparison,
which also plans, records, times a forward pass, and writes the card. Both take turns in one process, the first being
another one in each round; a round that is not counted comes before them. Medians, and the median of the ratios within
a round. Where no plan can be made (a warning says so) its seconds are missing. On one thread it is processor time that
is measured, which other work on the machine hardly touches.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from deltatune.comparing.cell import load_base, read_data, run_cell
from deltatune.comparing.experiment import Cell, make_experiment
from deltatune.models.adapters import save_adapter
from deltatune.training.tasks import task_for
from deltatune.training.tune import tune


def bare(cell: Cell, folder: Path) -> None:
    """The same work without a comparison around it."""
    data = read_data(cell)
    base = load_base(cell, data)
    tuned = tune(base, data, cell.method.make(), cell.training, seed=cell.seed)
    task_for(base, tuned.precision).test(data.test, tuned.max_length, cell.decoding)
    save_adapter(
        base.model,
        folder,
        base=base.id,
        revision=base.revision,
        labels=list(data.labels),
        data={"name": data.place},
        training=tuned.settings.model_dump(mode="json"),
        max_length=tuned.max_length,
        seed=cell.seed,
        task=data.task,
        pairs=False,
    )


def timed(run: Callable[[Cell, Path], object], cell: Cell) -> float:
    """Seconds that it takes in a new folder."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        began = clock()
        run(cell, Path(folder))
        return clock() - began


def main() -> None:
    """Prints what both take, and by how much the cell takes more."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--train", type=int, default=1600)
    parser.add_argument("--epochs", type=float, default=2)
    given = parser.parse_args()
    content = {
        "data": {"name": "rotten-tomatoes", "train": given.train, "validation": 500},
        "methods": [given.method],
        "training": {"epochs": given.epochs, "evaluations": 1},
    }
    [cell] = make_experiment(content).cells()
    small = make_experiment({**content, "data": {"name": "rotten-tomatoes", "train": 32, "validation": 8, "test": 8}})
    for run in (bare, run_cell):  # what is made once in a process is no cost of either
        timed(run, small.cells()[0])
    times: dict[str, list[float]] = {"bare": [], "cell": []}
    for number in range(given.rounds):
        pair = [("bare", bare), ("cell", run_cell)]
        for name, run in pair[:: 1 if number % 2 else -1]:
            times[name].append(timed(run, cell))
    shares = [1 - one / whole for one, whole in zip(times["bare"], times["cell"], strict=True)]
    print(f"bare {median(times['bare']):.1f} s, cell {median(times['cell']):.1f} s: {median(shares):.1%} of the cell")
    print("rounds: " + ", ".join(f"{share:+.1%}" for share in shares))


if __name__ == "__main__":
    main()
