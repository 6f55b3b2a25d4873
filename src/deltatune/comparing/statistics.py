"""How sure a measured accuracy is, and whether two methods differ by more than chance would make them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from deltatune.comparing.results import CellResult
from deltatune.errors import UserError

Verdict = Literal["better", "worse", "not distinguishable"]

Gains = npt.NDArray[np.int8]
"""Of each test example (and seed): 1 where only ours was right, -1 where only theirs was, else 0."""

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
    """How much more of the test split one method gets right than another, in [-1, 1], and whether that means anything.

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


def accuracy_interval(labels: Sequence[int], predictions: Sequence[int]) -> Interval:
    """The 95% interval of an accuracy measured on these test examples; see `wilson`."""
    correct = np.asarray(labels) == np.asarray(predictions)
    return wilson(float(correct.mean()), correct.size)


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
    """Test accuracy of the method with cells `a` minus that of the reference with cells `b`; None if no seed is shared.

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
    labels = np.asarray(ours.test_labels)
    if not np.array_equal(labels, np.asarray(theirs.test_labels)):
        raise UserError(
            f"'{ours.label}' and '{theirs.label}' with seed {ours.seed} were not tested on the same examples",
            "a comparison needs one test split: run it again in a new folder",
        )
    ours_right, theirs_right = ((np.asarray(cell.predictions) == labels).astype(np.int8) for cell in (ours, theirs))
    return np.asarray(ours_right - theirs_right, dtype=np.int8)


def _bootstrap(gains: Gains, generator: np.random.Generator) -> Interval:
    """The percentile interval of the mean of `gains` (examples, seeds)."""
    examples, seeds = gains.shape
    # A bootstrap cannot draw what it never saw: with four disagreements, all one way, it would call the matter settled.
    # One imagined disagreement each way (in the manner of Agresti & Min 2005) brings it in line with the exact test.
    imagined = np.array([[1], [-1]], dtype=np.int8).repeat(seeds, axis=1)
    # Examples with the same gains are interchangeable, so we draw how often each pattern comes up, not each example.
    patterns, counts = np.unique(np.vstack([gains, imagined]), axis=0, return_counts=True)
    draws = generator.multinomial(examples + 2, counts / counts.sum(), size=_RESAMPLES)  # (resamples, patterns)
    # Drawing one seed fewer than there are keeps the variance between seeds from coming out too small.
    drawn = max(1, seeds - 1)
    weights = generator.multinomial(drawn, np.full(seeds, 1 / seeds), size=_RESAMPLES)  # (resamples, seeds)
    means = (draws @ patterns * weights).sum(axis=1) / (drawn * (examples + 2))
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(low), float(high))
