"""How a step's time and memory grow with what one chooses: rank, tokens, text length, adapted layers, adapters.

python benchmarks/growth.py [--only rank tokens length layers adapters] [--steps 5] [--rounds 2] [--quick]

A decoder of SmolLM2-135M's width with random weights, LoRA on its linear layers, in the machine's precision; a step is
forward, backward and AdamW. Each point is a process of its own, forked from one that has the imports. Its time is the
median of its steps, and the points of a sweep are gone through in another order in each round. Its memory is the peak
of resident bytes during the steps above what was resident before them, so weights are not in it.

Beside the measured exponent of each sweep, the slope of a straight line on log–log, stands that of theory over the same
points: of floating point operations for the time, of the bytes that must be kept for the memory. A step that grows
faster than its theory by more than 0.15 is called worse.
"""

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from ctypes import CDLL
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from race.circumstances import circumstances, machine_folder
from transformers import AutoModelForCausalLM, LlamaConfig

import deltatune
from deltatune import LoRA, kernels
from deltatune.data.sequences import Sequences
from deltatune.models.attach import learning_rates, trainable_parameters
from deltatune.models.base import Base
from deltatune.training.memory import peak, resident
from deltatune.training.optimisers import make_optimiser
from deltatune.training.pieces import quicken
from deltatune.training.precision import prepare, resolve
from deltatune.training.tasks import task_for

WIDTH, INNER, HEADS, VOCABULARY = 576, 1536, 9, 1024
SHAPES = (*[(576, 576)] * 4, (1536, 576), (1536, 576), (576, 1536))
"""(out, in) of a block's linear layers: query, key, value, output, gate, up, down."""
WORSE = 0.15


@dataclass(frozen=True)
class Point:
    """One step's sizes."""

    rank: int = 8
    tokens: int = 1024
    length: int = 128
    """Tokens of each text."""
    blocks: int = 4
    layers: int = 4
    """Blocks that are adapted, from the top."""
    adapters: int = 1
    """Adapters side by side on the base, one of them active."""


SWEEPS: Mapping[str, tuple[Point, Sequence[int]]] = {
    "rank": (Point(), (1, 2, 4, 8, 16, 32, 64, 128, 256)),
    "tokens": (Point(), (256, 512, 1024, 2048, 4096, 8192, 16384)),
    "length": (Point(tokens=4096), (16, 32, 64, 128, 256, 512, 1024, 2048)),
    "layers": (Point(blocks=16), (1, 2, 4, 8, 16)),
    "adapters": (Point(), (1, 2, 4, 8, 16, 32)),
}


def operations(point: Point) -> float:
    """Floating point operations of a step: two for each multiplication with a weight, and again for a gradient."""
    frozen, thin = sum(o * i for o, i in SHAPES), sum(o + i for o, i in SHAPES)
    attention = 4 * point.length * WIDTH  # a token with each of its text, twice: scores and values
    forward = point.blocks * (2 * frozen + attention) + 2 * WIDTH * VOCABULARY
    # Through the adapted blocks and those above them, by the inputs alone; of attention by both factors.
    backward = point.layers * (2 * frozen + 2 * attention) + 2 * WIDTH * VOCABULARY
    return point.tokens * (forward + backward + point.layers * 6 * point.rank * thin)


def kept(point: Point) -> float:
    """Bytes that a step needs above the weights: inputs of the adapted layers, attention, gradients and moments."""
    size = 2 if resolve("auto") == "bf16" else 4
    trained = point.layers * point.rank * sum(o + i for o, i in SHAPES)
    inputs = 3 * WIDTH + INNER  # of attention, its output layer, the feed-forward part and its last layer
    products = WIDTH + 2 * WIDTH + 2 * INNER + len(SHAPES) * point.rank  # q, k, v, gate, up; x·Aᵀ
    weights = 0 if point.length > 256 or kernels.wide() else HEADS * point.length  # a fused kernel keeps none of them
    # Beside the gradients and both moments in fp32, A and B in the type of the activations.
    return point.tokens * point.layers * (inputs + products + weights) * size + trained * (12 + size)


def measure(point: Point, steps: int) -> dict[str, float]:
    """Seconds of a step and its bytes, in this process."""
    base, rows = _base(point), point.tokens // point.length
    targets = tuple(rf".*layers\.{number}\..*_proj" for number in range(point.blocks - point.layers, point.blocks))
    for number in range(point.adapters):
        deltatune.attach(base.model, LoRA(rank=point.rank, targets=targets), name=f"adapter{number}")
    precision = resolve("auto")
    prepare(base.model, precision)
    quicken(base.model, point.length)
    base.model.train()
    task = task_for(base, precision)
    ids = torch.randint(3, VOCABULARY, (rows, point.length)).tolist()
    batch = task.collate(Sequences(tuple(ids), tuple(ids), 0), range(rows))
    optimiser = make_optimiser("adamw", trainable_parameters(base.model), learning_rates(base.model), 0.01)
    gc.collect()
    CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, times = resident(), []
    for _ in range(steps + 2):
        began = time.perf_counter()
        task.backward(batch, batch.units)
        optimiser.step()
        optimiser.zero_grad()
        times.append(time.perf_counter() - began)
    return {"seconds": statistics.median(times[2:]), "bytes": peak() - before}


def _base(point: Point) -> Base:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=point.blocks, num_attention_heads=HEADS,
        vocab_size=VOCABULARY, tie_word_embeddings=True, pad_token_id=0,
        max_position_embeddings=4096,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    return Base(model, deltatune.load("minilm", labels=("a", "b")).tokenizer, "random", "")


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of the straight line through the logarithms, by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    return statistics.linear_regression(x, y).slope


def sweep(name: str, steps: int, rounds: int, most: int) -> dict[str, Any]:
    """All points of a sweep, with both exponents of both."""
    base, sizes = SWEEPS[name]
    sizes = sizes[:most]
    points = [replace(base, **{name: size}) for size in sizes]
    found: dict[Point, list[dict[str, float]]] = {point: [] for point in points}
    for number in range(rounds):
        for point in points[:: 1 if number % 2 == 0 else -1]:
            with get_context("fork").Pool(1) as pool:
                found[point].append(pool.apply(measure, (point, steps)))
    rows = [
        {
            "size": size,
            "seconds": statistics.median(one["seconds"] for one in found[point]),
            "bytes": statistics.median(one["bytes"] for one in found[point]),
            "operations": operations(point),
            "kept": kept(point),
        }
        for size, point in zip(sizes, points, strict=True)
    ]
    exponents = {key: exponent(sizes, [row[key] for row in rows]) for key in ("seconds", "bytes", "operations", "kept")}
    worse = [
        what
        for what, theory in (("seconds", "operations"), ("bytes", "kept"))
        if exponents[what] > exponents[theory] + WORSE
    ]
    return {"base": asdict(base), "rows": rows, "exponents": exponents, "worse": worse}


def main() -> None:
    """Measures, prints and writes."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    options.add_argument("--steps", type=int, default=5)
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--quick", action="store_true", help="the smallest points and two steps of each")
    options.add_argument("--out", type=Path, help="instead of the machine's own folder in benchmarks/results")
    given = options.parse_args()
    found = {}
    for name in given.only:
        steps, rounds, most = (2, 1, 3) if given.quick else (given.steps, given.rounds, 99)
        found[name] = sweep(name, steps, rounds, most)
        for row in found[name]["rows"]:
            print(f"{name} {row['size']}: {1000 * row['seconds']:.0f} ms, {row['bytes'] / 1e6:.0f} MB", flush=True)
        print(found[name]["exponents"], "worse:", found[name]["worse"], flush=True)
    around = circumstances(("torch", "transformers"))  # asked last: no threads may start here before forking
    folder = given.out or machine_folder(around["machine"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "growth.json"
    path.write_text(json.dumps({"quick": given.quick, **around, "sweeps": found}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
