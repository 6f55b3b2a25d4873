"""A machine as a plan sees it: how much memory it has, and how long it takes over an operation.

Measured here by `calibration.py`, or read from a data sheet: the peak of products in each type, the bandwidth and the
memory that a vendor states. `machines/` has sheets of common GPUs. Of a sheet's peaks a program reaches a part; the
parts below are round numbers from experience, not measurements of ours.
"""

import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deltatune.errors import UserError, unknown
from deltatune.planning.work import PRODUCTS, Traced, Work
from deltatune.training.precision import Computed

_SHEETS = Path(__file__).parent / "machines"
_OF_PEAK, _OF_BANDWIDTH, _LAUNCH = 0.5, 0.8, 6e-6
"""Of a sheet: what part of the peak products reach, of the bandwidth all else, and the seconds of starting one."""
_CONTEXT = 600 * 2**20
"""Bytes that CUDA and its libraries take of a GPU's memory."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Overhead:
    """Bytes of a process, or of a GPU, that are there whatever is trained."""

    imported: int = _CONTEXT
    """Once everything is imported."""
    loading: int = _CONTEXT
    """Once a model has been loaded."""
    training: int = _CONTEXT
    """Once a model has trained: with kernels and their caches."""
    classifying: int = _CONTEXT
    """Once a classifier has been scored: with scikit-learn."""


@dataclass(frozen=True)
class Machine:
    """What decides a plan besides the base, the method and the batch."""

    name: str
    memory: int
    """Bytes that a run can use."""
    precision: Computed
    """What `auto` means there."""
    source: str
    """Where the figures are from."""
    cuda: bool = False
    processes: Mapping[str, Overhead] = field(default_factory=dict)
    """What a process holds besides the run: `fresh`, or `forked` from one that has imported everything, as the runs of
    a comparison are, which shares what it never touches."""
    slack: float = 1.1
    """Memory that the allocator holds for what comes and goes in a step, on the bytes alive at their most."""
    most_slack: int = 2**60
    """The most bytes of it: what is large is mapped by itself, and given back."""
    heap: int = 0
    """Bytes that the heap holds besides, once weights have come and gone."""
    kernel: int = 0
    """Bytes of the kernel that is made for a product of a new shape, and kept."""
    making: float = 0.0
    """Seconds that making it takes."""
    products: Mapping[str, Sequence[tuple[tuple[float, ...], float]]] = field(default_factory=dict)
    """Type, or `operation type`, → measured products: (batch, m, k, n) and seconds."""
    moves: Mapping[str, Points] = field(default_factory=dict)
    """`operation type` → measured: bytes read and written, and seconds."""
    peaks: Mapping[str, float] = field(default_factory=dict)
    """Type → operations a second, of a sheet."""
    bandwidth: float = 0.0
    """Bytes a second, of a sheet."""
    call: float = _LAUNCH
    """Seconds that every operation takes before it does anything."""
    fresh: float = 1.0
    """How many times as long the work takes in a step as in the loops that measured it: memory is fresh."""

    def seconds(self, traced: Traced) -> float:
        """How long the work of a trace takes."""
        return traced.calls * self.call + self.fresh * self.work(traced)

    def work(self, traced: Traced) -> float:
        """How long it would take in a loop, without starting anything."""
        return sum(count * self.of(work) for work, count in traced.work.items())

    def of(self, work: Work) -> float:
        """Seconds of one operation, without those that starting it takes."""
        kind = str(work.dtype).removeprefix("torch.")
        if self.bandwidth:
            moved = work.nbytes / (_OF_BANDWIDTH * self.bandwidth)
            if work.name not in PRODUCTS:
                return moved
            peak = self.peaks.get(kind) or self.peaks["float32"]
            return max(moved, 2 * math.prod(work.shape) / (_OF_PEAK * peak))
        if work.name in PRODUCTS:
            measured = self.products.get(f"{work.name} {kind}") or self.products.get(kind) or self.products["float32"]
            return 2 * math.prod(work.shape) / _rate(measured, work.shape)
        return self._move(work.name, kind, work.nbytes)

    def _move(self, name: str, kind: str, size: float) -> float:
        name = name.rstrip("_") if f"{name} {kind}" not in self.moves else name
        for key in (f"{name} {kind}", f"{name} float32", f"mul {kind}", "mul float32"):
            if points := self.moves.get(key):
                return _between(points, size)
        raise AssertionError("every machine has measured a multiplication")

    def as_json(self) -> dict[str, Any]:
        """Plain data that `read` takes again."""
        return asdict(self)


def _rate(measured: Sequence[tuple[tuple[float, ...], float]], shape: tuple[int, ...]) -> float:
    """Operations a second of a product: that of the measured ones, the nearer the more it counts."""
    place = [math.log(max(1, size)) for size in shape]
    total = weights = 0.0
    for other, took in measured:
        apart = sum((a - math.log(b)) ** 2 for a, b in zip(place, other, strict=True))
        weight = 1 / (apart + 0.05) ** 2
        total += weight * math.log(2 * math.prod(other) / took)
        weights += weight
    return math.exp(total / weights)


def _between(points: Points, size: float) -> float:
    """Seconds at a size between measured ones; beyond them in proportion."""
    sizes = [point[0] for point in points]
    place = bisect_left(sizes, size)
    if place == 0:
        return points[0][1] * max(0.0, size / sizes[0])
    if place == len(points):
        return points[-1][1] * size / sizes[-1]
    (low, fast), (high, slow) = points[place - 1], points[place]
    share = (size - low) / (high - low)
    return fast + share * (slow - fast)


def sheets() -> list[str]:
    """The names of the sheets that ship with the library."""
    return sorted(path.stem for path in _SHEETS.glob("*.json"))


def read_machine(name: str) -> Machine:
    """The machine of a sheet that ships, such as `a100`, or of a file; raises `UserError` for what is none."""
    path = Path(name).expanduser()
    if not path.is_file():
        if name.lower() not in sheets():
            raise unknown("machine", name, sheets(), "give a JSON file as `deltatune doctor --measure --json` prints")
        path = _SHEETS / f"{name.lower()}.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return _of_sheet(facts) if "bandwidth_gb_s" in facts else from_json(facts)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} describes no machine: {error}", f"take one of {', '.join(sheets())} for a model"
        ) from error


def from_json(facts: Mapping[str, Any]) -> Machine:
    """The machine that `as_json` gave."""
    products = {
        kind: [(tuple(shape), took) for shape, took in measured] for kind, measured in facts["products"].items()
    }
    processes = {name: Overhead(**found) for name, found in facts["processes"].items()}
    return Machine(**{**facts, "products": products, "processes": processes})


def _of_sheet(facts: Mapping[str, Any]) -> Machine:
    peaks = {
        {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[kind]: 1e12 * value
        for kind, value in facts["tflops"].items()
    }
    return Machine(
        name=facts["name"],
        memory=int(facts["memory_gb"] * 2**30),
        precision="bf16" if "bf16" in facts["tflops"] else "fp32",
        source=facts["source"],
        cuda=True,
        processes={"fresh": Overhead(), "forked": Overhead()},
        peaks=peaks,
        bandwidth=1e9 * facts["bandwidth_gb_s"],
    )
