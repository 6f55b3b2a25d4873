"""How sure a measured accuracy is, and whether two methods differ by more than chance would make them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from deltatune.comparing.results import CellResult
from deltatune.errors import UserError

Verdict = Literal["better", "worse", "not distinguishable"]

Gains = npt.NDArray[np.float64]
"""Of each test example (and seed): by how much ours did better, in [-1, 1]; 1, 0, -1 for answers right or wrong."""

_Z = 1.959964
"""Standard deviations that hold the middle 95% of a normal distribution."""
_RESAMPLES = 2_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95% interval: of a hundred made in this way from fresh data, about 95 would hold the true value."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference:
    """How much better one method does on the test split than another, in [-1, 1], and whether that means anything.

    The interval is a percentile bootstrap (Efron & Tibshirani 1993, chapter 13) over test examples, paired: both
    methods answer the same resampled examples, so what is hard for both cancels out. With several seeds it resamples
    seeds and examples independently (Owen 2007, "The pigeonhole bootstrap").

    Assumptions: test examples are drawn independently from what the method will meet later, and so are seeds. With ONE
    seed the interval covers the choice of test examples only, not the luck of the seed; with two or three it covers
    that luck as roughly as two or three numbers can: where seeds matter much, 81-87% of such intervals held the true
    value in simulation, not 95%.
    """

    value: float
    interval: Interval
    seeds: tuple[int, ...]
    """The seeds that both methods finished, and that the difference is made from."""
    verdict: Verdict
    """"Not distinguishable" where the interval holds 0, else the side on which it lies."""


def mean_interval(cells: Sequence[CellResult]) -> Interval:
    """The 95% interval of the metric of one method: its mean over test examples, and over seeds where it has several.

    Wilson's where answers are right or wrong, else mean ± 1.96 standard errors: of the choice of examples alone.
    """
    values = np.array([cell.test_values for cell in cells])  # (seeds, examples)
    mean = float(values.mean())
    if np.isin(values, (0.0, 1.0)).all():
        return wilson(mean, values.shape[1])
    half = _Z * float(values.mean(axis=0).std()) / max(1, values.shape[1] - 1) ** 0.5
    return Interval(mean - half, mean + half)


def wilson(share: float, count: int) -> Interval:
    """The score interval of a share seen in `count` independent trials (Wilson 1927).

    Unlike the textbook ±1.96 standard errors it stays within [0, 1] and is right near 0, near 1 and for few trials.
    Several seeds tested on the same examples are no new trials: give their mean accuracy and count the examples once.
    The interval then covers the choice of test examples and says nothing about seeds.
    """
    centre = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * (share * (1 - share) / count + _Z**2 / (4 * count**2)) ** 0.5
    # At 0 and 1 the formula gives the bound exactly, but floating point misses it by a hair.
    return Interval(max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


def difference(a: Sequence[CellResult], b: Sequence[CellResult], generator_seed: int = 0) -> Difference | None:
    """The metric of the method with cells `a` minus that of the reference with cells `b`; None if no seed is shared.

    The same cells and `generator_seed` give the same interval. Raises UserError for cells tested on different examples.
    """
    ours, theirs = ({cell.seed: cell for cell in cells} for cells in (a, b))
    seeds = tuple(sorted(ours.keys() & theirs.keys()))
    if not seeds:
        return None
    gains = np.stack([_gain(ours[seed], theirs[seed]) for seed in seeds], axis=1)  # (examples, seeds)
    interval = _bootstrap(gains, np.random.default_rng(generator_seed))
    verdict: Verdict = "better" if interval.low > 0 else "worse" if interval.high < 0 else "not distinguishable"
    return Difference(float(gains.mean()), interval, seeds, verdict)


def _gain(ours: CellResult, theirs: CellResult) -> Gains:
    if (ours.test_digest, ours.metric) != (theirs.test_digest, theirs.metric):
        raise UserError(
            f"'{ours.label}' and '{theirs.label}' with seed {ours.seed} were not tested on the same examples",
            "a comparison needs one test split: run it again in a new folder",
        )
    return np.subtract(ours.test_values, theirs.test_values)


def _bootstrap(gains: Gains, generator: np.random.Generator) -> Interval:
    """The percentile interval of the mean of `gains` (examples, seeds)."""
    seeds = gains.shape[1]
    # A bootstrap cannot draw what it never saw: with four disagreements, all one way, it would call the matter settled.
    # One imagined disagreement each way (in the manner of Agresti & Min 2005) brings it in line with the exact test.
    # Where answers are better or worse by degrees, the examples show how much they vary.
    if np.isin(gains, (-1.0, 0.0, 1.0)).all():
        gains = np.vstack([gains, np.array([[1.0], [-1.0]]).repeat(seeds, axis=1)])
    # Examples with the same gains are interchangeable, so we draw how often each pattern comes up, not each example.
    patterns, counts = np.unique(gains, axis=0, return_counts=True)
    draws = generator.multinomial(counts.sum(), counts / counts.sum(), size=_RESAMPLES)  # (resamples, patterns)
    # Drawing one seed fewer than there are keeps the variance between seeds from coming out too small.
    drawn = max(1, seeds - 1)
    weights = generator.multinomial(drawn, np.full(seeds, 1 / seeds), size=_RESAMPLES)  # (resamples, seeds)
    means = (draws @ patterns * weights).sum(axis=1) / (drawn * counts.sum())
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(low), float(high))
