"""How sure a measured quality is, and whether two methods differ by more than chance would make them.

Every pair of methods is compared on the same test examples and seeds, so that what is hard for both cancels out. The
verdicts of all pairs of a comparison are one family: with Holm's correction at most 5% of comparisons call any two
methods different that are not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import median
from typing import Literal

import numpy as np

from deltatune.comparing.chance import Chance, Values, chance, holm, moderated
from deltatune.comparing.results import CellResult
from deltatune.errors import UserError

Verdict = Literal["better", "worse", "not distinguishable"]

LEVEL = 0.05
"""How often, of a hundred comparisons without any difference, one is allowed to show some."""

_Z = 1.959964
"""Standard deviations that hold the middle 95% of a normal distribution."""
_Z_POWER = 0.841621
"""Standard deviations below which 80% of a normal distribution lie."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95% interval: of a hundred made in this way from fresh data, about 95 would hold the true value."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference:
    """How much better one method does on the test split than another, in [-1, 1], and whether that means anything.

    Assumptions: test examples are drawn independently from what the method will meet later, and so are seeds. With ONE
    seed everything here covers the choice of test examples only, not the luck of the seed; from two on it covers both,
    and is wide where seeds are few and matter much. From four methods on, each pair learns from the others how much
    seeds matter.
    """

    value: float
    interval: Interval
    """Of this difference by itself."""
    seeds: tuple[int, ...]
    """The seeds that both methods finished, and that the difference is made from."""
    p: float
    """How often chance alone would show a difference so large; of this pair by itself."""
    adjusted_p: float
    """The same, adjusted for all the pairs that were looked at (Holm); what the verdict goes by."""
    effect: float
    """The difference in standard deviations of a single example's (Cohen's d of paired values): about 0.2 is called
    small, 0.5 medium, 0.8 large."""
    detectable: float
    """The smallest true difference that this many examples and seeds would show, in all pairs, 4 times out of 5."""
    verdict: Verdict
    """"Not distinguishable" where the adjusted p is above 0.05, else the side on which the difference lies."""

    @property
    def reversed(self) -> "Difference":
        """The same seen from the other method."""
        words: dict[Verdict, Verdict] = {"better": "worse", "worse": "better"}
        return replace(
            self,
            value=-self.value,
            interval=Interval(-self.interval.high, -self.interval.low),
            effect=-self.effect,
            verdict=words.get(self.verdict, self.verdict),
        )


@dataclass(frozen=True, slots=True)
class Pair:
    """Two methods, held against each other."""

    a: str
    """Label of the one that the difference is seen from: it is what `a` has more than `b`."""
    b: str
    difference: Difference


@dataclass(frozen=True, slots=True)
class Power:
    """What differences a comparison could show at all: its power line."""

    detectable: float
    """The smallest true difference that would be found 4 times out of 5, the median over the pairs."""
    best: float
    """The same for the pair where it is smallest."""
    pairs: int
    examples: int
    seeds: int
    """The most that any pair shares."""


def pairs(results: Sequence[CellResult]) -> list[Pair]:
    """Every two labels that share a seed, in order of appearance, with verdicts corrected for their number.

    Raises UserError for cells tested on different examples.
    """
    cells = {
        label: [cell for cell in results if cell.label == label] for label in dict.fromkeys(c.label for c in results)
    }
    gains = {(a, b): found for a, b in combinations(cells, 2) if (found := _gains(cells[a], cells[b])) is not None}
    spreads = moderated([chance(with_imagined(values)) for _, values in gains.values()], len(cells))
    p = [_p(values, spread) for (_, values), spread in zip(gains.values(), spreads, strict=True)]
    return [
        Pair(a, b, _difference(values, seeds, spread, alone, adjusted, len(gains)))
        for ((a, b), (seeds, values)), spread, alone, adjusted in zip(gains.items(), spreads, p, holm(p), strict=True)
    ]


def between(found: Sequence[Pair], a: str, b: str) -> Difference | None:
    """What `a` has more than `b`, of the pairs of a comparison; None where they share no seed."""
    for pair in found:
        if (pair.a, pair.b) == (a, b):
            return pair.difference
        if (pair.a, pair.b) == (b, a):
            return pair.difference.reversed
    return None


def power(found: Sequence[Pair], examples: int) -> Power | None:
    """The power line of a comparison on so many test examples; None where there is nothing to compare."""
    sizes = [pair.difference.detectable for pair in found]
    if not sizes:
        return None
    return Power(median(sizes), min(sizes), len(sizes), examples, max(len(pair.difference.seeds) for pair in found))


def difference(a: Sequence[CellResult], b: Sequence[CellResult]) -> Difference | None:
    """The metric of the method with cells `a` minus that of the one with cells `b`, as if no other were compared.

    None if no seed is shared. Raises UserError for cells tested on different examples.
    """
    if (found := _gains(a, b)) is None:
        return None
    seeds, values = found
    spread = chance(with_imagined(values))
    p = _p(values, spread)
    return _difference(values, seeds, spread, p, p, 1)


def mean_interval(cells: Sequence[CellResult]) -> Interval:
    """The 95% interval of the metric of one method: of its mean over test examples, and over seeds where there are any.

    Where answers are right or wrong it is Wilson's, for several seeds with the number of independent examples that
    would give the same standard error; else mean ± half-width within [0, 1], where the metric lies, with an imagined
    example at either end: two that happen to score alike do not show that all do.
    """
    values = np.array([cell.test_values for cell in cells], dtype=float).T  # (examples, seeds)
    binary = bool(np.isin(values, (0.0, 1.0)).all())
    if len(values) < 2 and not (binary and len(cells) == 1):  # one example does not show how examples vary
        return Interval(0.0, 1.0)
    if binary:
        found = chance(values)
        if len(cells) == 1 or found.error == 0:
            return wilson(found.mean, len(values))
        count, z = found.mean * (1 - found.mean) / found.error**2, found.half_width(LEVEL) / found.error
        return wilson(found.mean, count, z)
    found = chance(np.vstack([values, np.array([[0.0], [1.0]]).repeat(len(cells), axis=1)]))
    half = found.half_width(LEVEL)
    return Interval(max(0.0, found.mean - half), min(1.0, found.mean + half))


def wilson(share: float, count: float, z: float = _Z) -> Interval:
    """The score interval of a share seen in `count` independent trials (Wilson 1927).

    Unlike the textbook ±1.96 standard errors it stays within [0, 1] and is right near 0, near 1 and for few trials.
    """
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    # At 0 and 1 the formula gives the bound exactly, but floating point misses it by a hair.
    return Interval(max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


def _gains(a: Sequence[CellResult], b: Sequence[CellResult]) -> tuple[tuple[int, ...], Values] | None:
    """The seeds that both finished, and by how much `a` did better on each example with each of them."""
    ours, theirs = ({cell.seed: cell for cell in cells} for cells in (a, b))
    seeds = tuple(sorted(ours.keys() & theirs.keys()))
    if not seeds:
        return None
    return seeds, np.stack([_gain(ours[seed], theirs[seed]) for seed in seeds], axis=1)  # (examples, seeds)


def _gain(ours: CellResult, theirs: CellResult) -> Values:
    if (ours.test_digest, ours.metric) != (theirs.test_digest, theirs.metric):
        raise UserError(
            f"'{ours.label}' and '{theirs.label}' with seed {ours.seed} were not tested on the same examples",
            "a comparison needs one test split: run it again in a new folder",
        )
    return np.subtract(ours.test_values, theirs.test_values)


def with_imagined(gains: Values) -> Values:
    """The gains with two imagined ones, one each way, as large as those that are there (root mean square but for 0).

    Four gains, all one way and alike, show no spread and settle nothing: with these two (in the manner of Agresti & Min
    2005) the verdict is in line with the exact test of signs, which asks for six. Among many they hardly matter. Where
    nobody gained, a whole answer each way stands for it. One example stays alone, and says nothing.
    """
    if len(gains) < 2:
        return gains
    size = float((gains[gains != 0] ** 2).mean() ** 0.5) if gains.any() else 1.0
    return np.vstack([gains, np.array([[size], [-size]]).repeat(gains.shape[1], axis=1)])


def _p(gains: Values, spread: Chance) -> float:
    return spread.beyond(abs(spread.mean)) if gains.any() else 1.0


def _difference(
    gains: Values, seeds: tuple[int, ...], spread: Chance, p: float, adjusted: float, family: int
) -> Difference:
    value, half = float(gains.mean()), spread.half_width(LEVEL)
    deviation = float(gains.mean(axis=1).std())
    verdict: Verdict = "not distinguishable" if adjusted > LEVEL else "better" if value > 0 else "worse"
    return Difference(
        value=value,
        interval=Interval(max(-1.0, spread.mean - half), min(1.0, spread.mean + half)),
        seeds=seeds,
        p=p,
        adjusted_p=adjusted,
        effect=value / deviation if deviation else 0.0,
        detectable=min(1.0, (half if family == 1 else spread.half_width(LEVEL / family)) + _Z_POWER * spread.error),
        verdict=verdict,
    )
