import numpy as np
import pytest

from deltatune.comparing.results import CellResult
from deltatune.comparing.statistics import Interval, difference, mean_interval, wilson
from deltatune.errors import UserError

ERROR = 0.03
"""What 500 to 4,000 simulated intervals may miss 95% by."""


@pytest.mark.parametrize("share", [0.5, 0.83, 0.98])
def test_the_wilson_interval_holds_the_true_accuracy_in_95_of_100_test_sets(share: float):
    seen = np.random.default_rng(0).binomial(200, share, size=4_000) / 200
    held = [wilson(value, 200).low <= share <= wilson(value, 200).high for value in seen]
    assert np.mean(held) == pytest.approx(0.95, abs=ERROR)


def test_the_wilson_interval_is_the_published_one():
    interval = wilson(0.8, 10)
    assert (interval.low, interval.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_an_interval_stays_within_0_and_1_and_holds_the_accuracy_itself():
    assert wilson(1.0, 2).high == 1
    assert wilson(0.0, 2).low == 0
    for right in range(21):
        assert wilson(right / 20, 20).low <= right / 20 <= wilson(right / 20, 20).high


def cell(template: CellResult, values: np.ndarray, seed: int = 0) -> CellResult:
    return template.model_copy(update={"test_values": values.astype(float).tolist(), "seed": seed})


def right_or_wrong(generator: np.random.Generator, examples: int, advantage: float) -> tuple[np.ndarray, np.ndarray]:
    """Which answers of two methods are right: what is hard for one is hard for the other."""
    hard, luck = generator.normal(size=examples), generator.normal(size=(2, examples))
    return (hard + luck[0] < 1.2 + advantage).astype(int), (hard + luck[1] < 1.2).astype(int)


@pytest.mark.parametrize("advantage", [0.0, 0.3])
def test_the_interval_holds_the_true_difference_in_95_of_100_test_sets(make_cell, advantage: float):
    generator, template = np.random.default_rng(1), make_cell(examples=1)
    truth = np.subtract(*(answers.mean() for answers in right_or_wrong(generator, 2_000_000, advantage)))
    held = []
    for _ in range(500):
        ours, theirs = (cell(template, values) for values in right_or_wrong(generator, 400, advantage))
        interval = difference([ours], [theirs]).interval
        held.append(interval.low <= truth <= interval.high)
    assert np.mean(held) == pytest.approx(0.95, abs=ERROR)


def test_with_several_seeds_the_interval_covers_the_luck_of_the_seed_too(make_cell):
    """Each seed shifts a method's accuracy: three and five seeds cover as often as they say, one by far not."""
    generator, template = np.random.default_rng(2), make_cell(examples=1)
    held = {1: [], 3: [], 5: []}
    for _ in range(200):
        hard = generator.normal(size=500)
        ours, theirs = (
            [
                cell(template, 1.2 + shift > hard + generator.normal(size=500), seed)
                for seed, shift in enumerate(generator.normal(0, 0.25, 5))
            ]
            for _ in range(2)
        )
        for seeds, hits in held.items():
            interval = difference(ours[:seeds], theirs[:seeds]).interval
            hits.append(interval.low <= 0 <= interval.high)
    assert min(np.mean(held[3]), np.mean(held[5])) > 0.92
    assert np.mean(held[1]) < 0.75


def test_identical_predictions_differ_by_exactly_0_and_are_not_distinguishable(make_cell):
    found = difference([make_cell("a")], [make_cell("a")])
    assert (found.value, found.verdict) == (0, "not distinguishable")
    assert found.interval.low < 0 < found.interval.high, (
        "that they agree on 1280 examples is no proof that they always do"
    )


@pytest.mark.parametrize(
    ("disagreements", "verdict"), [(3, "not distinguishable"), (5, "not distinguishable"), (8, "better")]
)
def test_a_handful_of_disagreements_settles_nothing(make_cell, disagreements: int, verdict: str):
    """McNemar's exact test calls 5 of 5 one way p = 0.06, 8 of 8 p = 0.008."""
    ours, theirs, template = np.ones(1_000), np.ones(1_000), make_cell(examples=1)
    theirs[:disagreements] = 0
    assert difference([cell(template, ours)], [cell(template, theirs)]).verdict == verdict


def test_answers_better_by_degrees_have_intervals_that_hold_the_truth(make_cell):
    generator, template = np.random.default_rng(3), make_cell(examples=1)
    held = {"mean": [], "difference": []}
    for _ in range(120):
        theirs = generator.beta(2, 3, size=200)
        ours = theirs + generator.beta(2, 5, size=200) * (1 - theirs)  # 2/7 of the rest better: 0.4 and 0.4 + 0.6 · 2/7
        one, other = cell(template, ours), cell(template, theirs)
        found = {"mean": mean_interval([other]), "difference": difference([one], [other]).interval}
        for name, truth in (("mean", 0.4), ("difference", 0.6 * 2 / 7)):
            held[name].append(found[name].low <= truth <= found[name].high)
    assert [np.mean(hits) for hits in held.values()] == pytest.approx([0.95, 0.95], abs=0.05)


def test_the_difference_has_a_direction(make_cell):
    good, bad = [make_cell("good", accuracy=0.9)], [make_cell("bad", accuracy=0.8)]
    assert difference(good, bad).verdict == "better"
    assert difference(bad, good).verdict == "worse"
    assert difference(good, bad).value == pytest.approx(0.1) == -difference(bad, good).value


def test_the_same_cells_give_the_same_interval_whatever_their_order(make_cell):
    ours, theirs = ([make_cell(name, seed=seed) for seed in range(3)] for name in ("ours", "theirs"))
    assert difference(ours, theirs) == difference(ours[::-1], theirs)
    assert isinstance(difference(ours, theirs).interval, Interval)


def test_cells_are_paired_by_seed(make_cell):
    ours = [make_cell("ours", seed=seed, accuracy=0.8 + seed / 50) for seed in (0, 1, 2)]
    theirs = [make_cell("theirs", seed=seed, accuracy=0.8) for seed in (1, 2, 3)]
    found = difference(ours, theirs)
    assert found.seeds == (1, 2)
    assert found.value == pytest.approx(0.03, abs=1 / 1280)
    assert difference(ours[:1], theirs) is None


def test_cells_tested_on_different_examples_are_refused_by_name(make_cell):
    with pytest.raises(UserError, match="'ours' and 'theirs' with seed 0 were not tested on the same examples"):
        difference([make_cell("ours")], [make_cell("theirs", examples=100)])
