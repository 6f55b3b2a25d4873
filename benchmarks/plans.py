"""How right plans are: peak memory and seconds of a training step, planned and measured, and how the errors lie.

python benchmarks/plans.py [--bases minilm smollm2] [--only lora] [--batches 2] [--out plans.jsonl]

Methods × storages × batch shapes × both embedded bases. Each cell is a process of its own, forked from one that has
imported everything, as those of `deltatune compare` are; it loads the base, trains a few epochs of a few batches of the
embedded data, and scores a validation after each. In the first epoch a run tries out which fast pieces give the same
and makes kernels for each size of a batch; a step is measured in the later ones, whose batches are the same again. The
plan is made by another process from the configuration and the lengths of the examples. The machine's calibration
(`deltatune doctor --measure`) has seen none of these shapes; run it in the same minutes.
"""

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import deltatune
from deltatune import Training
from deltatune.methods import Method, parse
from deltatune.planning.plan import plan_run
from deltatune.training.events import Event, Step
from deltatune.training.memory import peak, resident

METHODS = (
    *("full", "head", "lora", "lora:dropout=0.1", "lora:targets=attention-qv", "dora", "adalora", "vera", "ia3"),
    *("hira", "oft", "waveft", "shira", "houlsby", "parallel", "prompt", "prefix", "bitfit", "last-k"),
)
STORED = ("lora", "dora", "vera")
SHAPES = {"minilm": ((512, 64), (1024, 32)), "smollm2": ((256, 128), (512, 160))}
"""Tokens of a batch, and the longest example."""
EPOCHS = 4


def cells(bases: list[str]) -> Iterator[dict[str, Any]]:
    """Every cell, as what a process is told."""
    for place in (0, 1):
        for words in METHODS:
            for base in bases:
                tokens, longest = SHAPES[base][place]
                for storage in ("", "nf4", "int8") if words in STORED else ("",):
                    if base == "minilm" or words != "head":  # smollm2's head is a part of it
                        yield {"base": base, "method": words, "storage": storage, "tokens": tokens, "longest": longest}


def given(cell: dict[str, Any], batches: int) -> tuple[Any, Method, Training]:
    """The data of a cell, enough for about so many batches, its method, and its settings."""
    text = cell["base"] == "smollm2"
    data = deltatune.load_data("docstrings" if text else "rotten-tomatoes")
    examples = batches * cell["tokens"] // (100 if text else 27)
    data = data.limited(train=max(8, examples), validation=20 if text else 80, test=20, seed=0)
    settings = Training(batch_tokens=cell["tokens"], max_length=cell["longest"], evaluations=1, epochs=EPOCHS)
    return data, deltatune.make(*parse(cell["method"])), settings


def run(cell: dict[str, Any], batches: int) -> dict[str, Any]:
    """Trains one cell in this process; gives what was measured."""
    data, method, settings = given(cell, batches)
    # What others run touches a processor's time little.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    before = resident()
    base = deltatune.load(cell["base"], labels=data.labels, storage=cell["storage"])
    loaded = peak()
    times: list[float] = []
    steps: list[float] = []

    def listen(event: Event) -> None:
        times.append(clock())
        if isinstance(event, Step):
            steps.append(times[-1] - times[-2])

    deltatune.tune(base, data, method, settings, listen=listen)
    size = len(steps) // EPOCHS
    first, *later = (statistics.fmean(steps[start : start + size]) for start in range(0, len(steps), size))
    step = statistics.median(later)
    return {
        "peak": peak(),
        "before": before,
        "loaded": loaded,
        "steps": len(steps),
        "step": step,
        "once": size * (first - step),
    }


def in_a_process(cell: dict[str, Any], batches: int) -> dict[str, Any]:
    """Runs one cell in a process forked for it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            with os.fdopen(write, "w") as out:
                json.dump(run(cell, batches), out)
        except BaseException:
            traceback.print_exc(file=sys.stdout)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as back:
        text = back.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {}


def main() -> None:
    """Measures what the command line asks for and prints the errors."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--bases", nargs="*", default=["minilm", "smollm2"])
    options.add_argument("--only", nargs="*", default=None, help="methods")
    options.add_argument("--batches", type=int, default=2, help="about so many in an epoch")
    options.add_argument("--out", type=Path, default=Path("plans.jsonl"))
    options.add_argument("--again", action="store_true", help="plan what OUT has measured, and measure nothing")
    asked = options.parse_args()
    rows: list[dict[str, Any]] = []
    if asked.out.exists():
        rows = [json.loads(line) for line in asked.out.read_text().splitlines()]
    if not asked.again:
        done = [row["cell"] for row in rows]
        for cell in cells(asked.bases):
            if cell in done or (asked.only and cell["method"] not in asked.only):
                continue
            measured = in_a_process(cell, asked.batches)
            if measured:
                rows.append({"cell": cell, "measured": measured})
                with asked.out.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    report(rows, asked.batches)


def report(rows: list[dict[str, Any]], batches: int) -> None:
    """Plans every cell again and prints each error, and the distribution over all."""
    memory, times = [], []
    for row in rows:
        cell, measured = row["cell"], row["measured"]
        data, method, settings = given(cell, batches)
        plan = plan_run(cell["base"], data, method, settings, storage=cell["storage"], forked=True)
        assert plan.seconds is not None
        step = (plan.seconds - plan.making_seconds) / measured["steps"]
        memory.append(plan.memory.peak / measured["peak"] - 1)
        times.append(step / measured["step"] - 1)
        label = f"{cell['base']} {cell['method']} {cell['storage']} {cell['tokens']}×{cell['longest']}"
        print(
            f"{label:48} {plan.memory.peak / 1e6:7.0f} {measured['peak'] / 1e6:7.0f} MB {100 * memory[-1]:+6.1f}%   "
            f"{plan.memory.fullest:8} {1000 * step:6.0f} {1000 * measured['step']:6.0f} ms {100 * times[-1]:+6.1f}%   "
            f"once {plan.making_seconds:5.2f} {measured['once']:5.2f} s",
            flush=True,
        )
    for name, errors in (("memory", memory), ("time", times)):
        sizes = sorted(map(abs, errors))
        ninth = sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))]
        print(f"{name}: {len(sizes)} cells, median {100 * statistics.median(sizes):.1f}%, p90 {100 * ninth:.1f}%")


if __name__ == "__main__":
    main()
