"""How much chance moves a mean over test examples and seeds, and how far out a value lies.

A table of values, (examples, seeds), is read as a mean, an effect of each example, an effect of each seed and a rest:
both examples and seeds are drawn anew by whoever repeats the comparison (crossed random effects; Searle, Casella &
McCulloch 1992). The mean then varies as √a·N + √b·t: the examples' part is normal, and that of the seeds, with the
rest that falls to each, is Student's t, since their spread is known from a few seeds alone (a sum of this kind is
Behrens' and Fisher's).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import digamma, ndtr, polygamma, stdtr, stdtrit

Values = npt.NDArray[np.float64]
"""Of each test example and seed: a score, or by how much one method did better than another."""

_MOST = 1e6
"""Degrees of freedom that are as good as infinitely many."""
_NEGLIGIBLE = 0.01
"""Share of the examples' variance up to which the seeds' is left out."""


@dataclass(frozen=True, slots=True)
class Chance:
    """The mean of a table of values and how it would vary if everything were drawn anew."""

    mean: float
    examples: int
    seeds: int
    of_examples: float
    """Variance of the mean that comes from the choice of examples, were these seeds all there are."""
    rest: float = 0.0
    """The part of it that falls to a single example with a single seed, which the spread of the seeds holds as well."""
    between: float = 0.0
    """Mean square between the seeds, of what one example gives: their luck and that rest."""
    freedom: float = 0.0
    """Degrees of freedom of `between`: one less than the seeds, and more where other methods tell of it as well."""

    @property
    def of_seeds(self) -> float:
        """Variance of the mean that comes from the luck of the seeds and the rest; 0 for one seed, which shows none."""
        return self.between / (self.examples * self.seeds) if self.freedom else 0.0

    @property
    def error(self) -> float:
        """The standard error of the mean: with seeds that agree by luck no less than that of these seeds alone."""
        return float(max(self.of_examples, self.of_examples - self.rest + self.of_seeds) ** 0.5)

    def beyond(self, distance: float) -> float:
        """The probability that chance alone takes the mean this far from the truth, either way."""
        if self.examples < 2:  # one example shows no spread
            return 1.0
        if self.error == 0:
            return float(distance == 0)
        return max(self._beyond_with_these_seeds(distance), self._beyond_with_any(distance))

    def half_width(self, level: float) -> float:
        """The distance that chance alone goes beyond with probability `level`; infinite where nothing can be said."""
        if self.examples < 2:
            return float("inf")
        if self.error == 0:
            return 0.0
        least = float(-stdtrit(self.examples - 1, level / 2) * self.of_examples**0.5)
        if self._beyond_with_any(least) <= level:
            return least
        most = -stdtrit(self.freedom, level / 4) * self.of_seeds**0.5 + 40 * self.of_examples**0.5
        return float(brentq(lambda distance: self._beyond_with_any(distance) - level, least, most, rtol=1e-6))

    def _beyond_with_these_seeds(self, distance: float) -> float:
        if self.of_examples == 0:
            return float(distance == 0)
        return float(2 * stdtr(self.examples - 1, -distance / self.of_examples**0.5))

    def _beyond_with_any(self, distance: float) -> float:
        of_examples = self.of_examples - self.rest
        if self.of_seeds <= _NEGLIGIBLE * of_examples:
            return 0.0
        normal, weights = _normal()
        upper = stdtr(self.freedom, (normal * of_examples**0.5 - distance) / self.of_seeds**0.5)
        return float(min(1.0, 2 * (upper @ weights)))  # both sides alike


def chance(values: Values) -> Chance:
    """What the table (examples, seeds) says of its mean."""
    count, seeds = values.shape
    mean = float(values.mean())
    examples = values.mean(axis=1) - mean
    between_examples = seeds * float(examples @ examples) / max(1, count - 1)
    if seeds == 1:
        return Chance(mean, count, 1, between_examples / count)
    own = values.mean(axis=0) - mean
    between_seeds = count * float(own @ own) / (seeds - 1)
    single = values - mean - examples[:, None] - own
    noise = float((single**2).sum()) / max(1, (count - 1) * (seeds - 1))
    # Examples and seeds both show the rest, which is in the mean but once. It is taken off the examples, which tell it
    # precisely: taken off the seeds it would make few that agree by luck look sure.
    rest = min(noise, between_examples) / (count * seeds)
    return Chance(mean, count, seeds, between_examples / (count * seeds), rest, between_seeds, seeds - 1)


def moderated(pairs: Sequence[Chance], methods: int) -> list[Chance]:
    """The same, where each pair of methods learns from all the others how much seeds matter (Smyth 2004, limma).

    Three seeds tell so little of their own spread that in a family of many pairs hardly anything could be shown. How
    much the spreads of all pairs differ says how far they may be taken for one: their common spread then counts as
    `d0` degrees of freedom more. Two cautions keep a method that is noisier than most from false alarms: a pair's own
    spread is never made smaller, and d0, which pairs that share a method make look larger than it is, counts half.
    With fewer than four methods, or one seed, there is nothing to learn from.
    """
    several = [pair for pair in pairs if pair.freedom and pair.between > 0]
    if methods < 4 or len({pair.seeds for pair in pairs}) != 1 or len(several) < 6:
        return list(pairs)
    freedom = several[0].freedom
    more, common = _common_spread(np.array([pair.between for pair in several]), freedom)
    more = min(more, (methods - 1) * freedom) / 2
    return [
        replace(
            pair,
            between=max(pair.between, (more * common + freedom * pair.between) / (more + freedom)),
            freedom=freedom + more,
        )
        for pair in pairs
    ]


def _common_spread(squares: Values, freedom: float) -> tuple[float, float]:
    """d0 and s0² such that mean squares look like s0²·F with `freedom` and d0 degrees of freedom (Smyth 2004, 6.2)."""
    logs = np.log(squares) - digamma(freedom / 2) + np.log(freedom / 2)
    beyond = float(logs.var(ddof=1) - polygamma(1, freedom / 2))
    if beyond <= polygamma(1, _MOST / 2):
        return float("inf"), float(np.exp(logs.mean()))
    half = brentq(lambda half: polygamma(1, half) - beyond, 1e-6, _MOST / 2)
    return 2 * half, float(np.exp(logs.mean() + digamma(half) - np.log(half)))


def holm(values: list[float]) -> list[float]:
    """p-values adjusted for being several (Holm 1979): below 0.05 wrongly, any of them, in at most 5% of comparisons.

    That holds however the tests depend on each other, and those of all pairs do; it needs no resampling, whose
    extreme quantiles a few seeds cannot give.
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    adjusted, least = [1.0] * len(values), 0.0
    for place, index in enumerate(order):
        least = max(least, min(1.0, (len(values) - place) * values[index]))
        adjusted[index] = least
    return adjusted


@cache
def _normal() -> tuple[Values, Values]:
    """Points of a standard normal variable and their probabilities."""
    points = np.linspace(-8.0, 8.0, 161)
    edges = np.concatenate([[-np.inf], (points[1:] + points[:-1]) / 2, [np.inf]])
    return points, np.diff(ndtr(edges))
