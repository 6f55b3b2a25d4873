"""Methods of one size: for each the rank, the number of tokens … with which it comes nearest to a reference."""

from collections.abc import Callable
from dataclasses import dataclass

from deltatune.comparing.choices import By, MethodChoice
from deltatune.comparing.experiment import Experiment
from deltatune.data import DialogueData, TextData
from deltatune.errors import UserError
from deltatune.models.count import count
from deltatune.models.places import Place

_ITEMSIZE = 4
"""Bytes of a number in an adapter file: what trains is kept in fp32."""
_MOST = 2**20
"""The largest size that is tried."""

Measure = Callable[[MethodChoice], float]
"""What a method has of what is matched. Raises `UserError` where it does not fit the base."""


@dataclass(frozen=True, slots=True)
class Matched:
    """How one method was matched, and how near it came."""

    label: str
    by: By
    to: str
    """The label of the reference."""
    wanted: float
    """What the reference has."""
    reached: float
    setting: str
    """The hyperparameter that was chosen for it; "" where the method has none and stays as it is."""
    value: int | None
    """What was chosen."""

    @property
    def ratio(self) -> float:
        """What it has as a multiple of what the reference has."""
        return self.reached / self.wanted if self.wanted else float(self.reached == 0)


def match(experiment: Experiment, place: Place, data: TextData | DialogueData) -> tuple[Experiment, list[Matched]]:
    """The experiment with sizes chosen as its `match` says, and how near each came; unchanged where it has none.

    Parameters and bytes are counted; memory and time are planned for this machine. Raises `UserError` where the
    reference has nothing to match.
    """
    if experiment.match is None:
        return experiment, []
    by, to = experiment.match.by, experiment.match.to or experiment.methods[0].label
    measure = _measure(experiment, by, place, data)
    reference = next(choice for choice in experiment.methods if choice.label == to)
    wanted = measure(reference)
    if wanted == 0:
        raise UserError(
            f"{to} trains nothing beside the head, so there is nothing to match", "name another method in match.to"
        )
    choices, found = [], []
    for choice in experiment.methods:
        size = "" if choice is reference else getattr(choice.make(), "grows_by", "")
        chosen = nearest(_sizes(measure, choice, size), wanted) if size else None
        resized = choice if chosen is None else choice.resized(size, chosen)
        choices.append(resized)
        found.append(Matched(resized.label, by, to, wanted, measure(resized), size, chosen))
    changed = {**experiment.model_dump(), "methods": [choice.model_dump() for choice in choices], "match": None}
    return Experiment.model_validate(changed), found


def nearest(size_of: Callable[[int], float | None], wanted: float) -> int | None:
    """The number k for which `size_of`, which rises or falls with k, is nearest to what is wanted; None if none fits.

    It gives None for a k that is refused. First k doubles until the mark is passed, then the gap is halved. Where only
    some k fit, such as divisors, one of those between may be missed. In the end its neighbours are no nearer: planned
    memory falls a little where a method computes larger sizes otherwise.
    """
    seen: dict[int, float] = {}
    tried = {0}

    def off(k: int) -> float | None:
        tried.add(k)
        size = size_of(k)
        if size is None:
            return None
        seen[k] = size
        return size - wanted

    def beyond(distance: float | None) -> bool:
        """Whether it is refused, on the other side of the mark than `low`, or farther from it."""
        return distance is None or distance * (seen[low] - wanted) <= 0 or abs(distance) > abs(seen[low] - wanted)

    low, high = 0, 1
    while high < _MOST:
        distance = off(high)
        if seen and low and beyond(distance):
            break
        low, high = high if distance is not None else 0, 2 * high
    while low and high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if beyond(off(middle)) else (middle, high)
    while seen:
        best = min(seen, key=lambda k: (abs(seen[k] - wanted), k))
        beside = {best - 1, best + 1} - tried
        if not beside:
            return best
        for k in beside:
            off(k)
    return None


def _measure(experiment: Experiment, by: By, place: Place, data: TextData | DialogueData) -> Measure:
    return _counter(by, place, data) if by in ("parameters", "bytes") else _planner(experiment, by, data)


def _planner(experiment: Experiment, by: By, data: TextData | DialogueData) -> Measure:
    """What is planned for a run of the experiment on this machine."""
    from deltatune.planning.plan import plan_run

    def measure(choice: MethodChoice) -> float:
        planned = plan_run(
            experiment.base,
            data,
            choice.make(),
            experiment.training,
            storage=choice.storage,
            seed=experiment.seeds[0],
            forked=True,
        )
        return planned.memory.peak if by == "memory" else planned.seconds or 0.0

    return measure


def _counter(by: By, place: Place, data: TextData | DialogueData) -> Measure:
    def measure(choice: MethodChoice) -> float:
        counted = count(place, choice.make(), data.labels)
        return counted.trainable - counted.head if by == "parameters" else _ITEMSIZE * (counted.stored - counted.head)

    return measure


def _sizes(measure: Measure, choice: MethodChoice, size: str) -> Callable[[int], float | None]:
    """What the method has with k as its size; None for a k that does not fit."""

    def size_of(k: int) -> float | None:
        try:
            return measure(choice.resized(size, k))
        except UserError:
            return None

    return size_of
