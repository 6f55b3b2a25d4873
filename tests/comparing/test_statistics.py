import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t

from deltatune.comparing.chance import Chance, _common_spread, chance, holm, moderated
from deltatune.comparing.results import CellResult
from deltatune.comparing.statistics import Interval, between, difference, mean_interval, pairs, power, wilson
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
    for _ in range(150):
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


def test_one_example_says_nothing_of_others_and_no_interval_leaves_0_to_1(make_cell):
    def cell(*values, seed=0):
        return make_cell(seed=seed, examples=len(values)).model_copy(update={"test_values": list(values)})

    nothing = Interval(0.0, 1.0)
    assert mean_interval([cell(0.3)]) == mean_interval([cell(0.3), cell(0.4, seed=1)]) == nothing
    assert mean_interval([cell(1.0), cell(0.0, seed=1)]) == nothing
    low = mean_interval([cell(0.0, 0.0, 0.9, 0.01)])
    assert low.low == 0 < low.high < 1


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(
    ("examples", "verdict"), [(1, "not distinguishable"), (4, "not distinguishable"), (8, "better")]
)
def test_a_few_examples_that_all_gain_the_same_settle_nothing(make_cell, examples: int, verdict: str, seeds: int):
    """Without spread among them: by the signs alone 4 of 4 are p = 0.13, and 8 of 8 p = 0.008."""
    template = make_cell(examples=1)
    ours, theirs = ([cell(template, np.full(examples, v), s) for s in range(seeds)] for v in (0.5, 0.2))
    found = difference(ours, theirs)
    assert found.verdict == verdict
    assert found.p > 0.001
    assert found.interval.low < found.value < found.interval.high
    assert (found.interval.low < 0) == (verdict != "better")
    alone = mean_interval(ours)
    assert alone.low < 0.4
    assert alone.high > 0.6


def test_seeds_that_agree_by_luck_are_not_taken_for_sure(make_cell):
    """Three seeds that each gain 3 of 20, on other examples: neither seeds nor examples seem to differ."""
    template, gains = make_cell(examples=1), np.zeros((20, 3))
    for seed in range(3):
        gains[3 * seed : 3 * seed + 3, seed] = 1
    ours, theirs = ([cell(template, column, s) for s, column in enumerate(table.T)] for table in (gains, 0 * gains))
    assert chance(gains).of_seeds == 0
    found = difference(ours, theirs)
    assert found.p > 0.001
    assert found.interval.high - found.value > 0.05


def test_methods_noisier_than_the_others_raise_no_false_alarms():
    """16% of such comparisons called some different while the examples' noise was taken off the spread of the seeds."""
    generator, luck, alarms = np.random.default_rng(8), np.array([0.01] * 8 + [0.05] * 2), 0
    for _ in range(100):
        means = luck[:, None] * generator.normal(size=(10, 3))
        values = means[:, None] + generator.normal(0, 0.3, size=(10, 300, 3))
        found = moderated([chance(one - other) for one, other in combinations(values, 2)], 10)
        alarms += min(holm([one.beyond(abs(one.mean)) for one in found])) <= 0.05
    assert alarms <= 10  # of 100 with a chance of 5%, more are one in 90


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


def test_holm_gives_the_published_adjustment():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_verdict_of_one_pair_may_be_none_among_many(make_cell):
    """As they stand by themselves the first two differ; of ten alike, some two would by chance."""
    ours, theirs = np.ones(1_000), np.ones(1_000)
    ours[:5], theirs[5:21] = 0, 0  # 16 disagreements one way and 5 the other
    cells = [cell(make_cell(label, examples=1), values) for label, values in (("a", ours), ("b", theirs))]
    alone = difference(cells[:1], cells[1:])
    among = pairs([*cells, *(cell(make_cell(f"c{n}", examples=1), ours) for n in range(8))])
    found = between(among, "a", "b")
    assert len(among) == 45
    assert alone.verdict == "better"
    assert found.verdict == "not distinguishable"
    assert (found.value, found.interval, found.p) == (alone.value, alone.interval, alone.p)
    assert found.p < 0.05 < found.adjusted_p
    assert found.detectable > alone.detectable > alone.interval.high - alone.value


def test_a_pair_can_be_seen_from_either_side(make_cell):
    found = pairs([make_cell("good", accuracy=0.9), make_cell("bad", accuracy=0.8)])
    there, back = between(found, "good", "bad"), between(found, "bad", "good")
    assert (there.verdict, back.verdict) == ("better", "worse")
    assert (there.value, there.effect, there.p) == (-back.value, -back.effect, back.p)
    assert (there.interval.low, there.interval.high) == (-back.interval.high, -back.interval.low)
    assert there.effect == pytest.approx(0.1 / np.sqrt(0.1 - 0.01), rel=0.2)
    assert between(found, "good", "another") is None


def test_the_power_line_is_of_all_pairs(make_cell):
    few = pairs([make_cell(label, seed=s, examples=200) for label in ("a", "bb", "ccc") for s in (0, 1, 2)])
    many = pairs([make_cell(label, seed=s, examples=2_000) for label in ("a", "bb", "ccc") for s in (0, 1, 2)])
    small, large = power(few, 200), power(many, 2_000)
    assert (small.pairs, small.seeds, small.examples) == (3, 3, 200)
    assert small.detectable > 2 * large.detectable > 0
    assert small.best <= small.detectable
    assert power([], 100) is None


def test_the_spread_of_a_mean_is_that_of_examples_and_seeds_together():
    """With seeds alone it is Student's t of their means; with examples alone that of the examples'."""
    generator = np.random.default_rng(4)
    seeds, examples = generator.normal(size=3), generator.normal(size=500)
    of_seeds = chance(np.tile(seeds, (500, 1)) + 1e-6 * generator.normal(size=(500, 3)))
    assert of_seeds.error == pytest.approx(seeds.std(ddof=1) / 3**0.5, rel=1e-3)
    assert of_seeds.half_width(0.05) == pytest.approx(t.ppf(0.975, 2) * of_seeds.error, rel=1e-2)
    of_examples = chance(np.tile(examples[:, None], (1, 3)))
    assert of_examples.error == pytest.approx(examples.std(ddof=1) / 500**0.5)
    assert of_examples.half_width(0.05) == pytest.approx(t.ppf(0.975, 499) * of_examples.error)


def test_pairs_learn_from_each_other_how_much_seeds_matter():
    """Of equal spreads three seeds' own tell little and all together much; unlike ones are left to themselves."""
    generator = np.random.default_rng(6)
    alike = [Chance(0, 500, 3, 1e-6, 0.0, float(square), 2) for square in generator.chisquare(2, 45) / 2]
    learnt = moderated(alike, 10)
    assert all(after.freedom == 2 + 9 for after in learnt)  # half of the 18 of ten methods
    assert all(after.between >= before.between for before, after in zip(alike, learnt, strict=True))
    assert min(after.between for after in learnt) > 0.5
    assert moderated(alike[:3], 3) == alike[:3]
    unlike = [replace(one, between=one.between * 10.0**k) for k, one in zip(np.linspace(-6, 6, 45), alike, strict=True)]
    assert all(after.freedom < 2.3 for after in moderated(unlike, 10))


def test_the_common_spread_is_found_from_its_traces():
    """Mean squares of 4 degrees of freedom whose true values scatter as those of 8 would around 2."""
    generator = np.random.default_rng(7)
    truth = 2 * 8 / generator.chisquare(8, 4_000)
    more, common = _common_spread(truth * generator.chisquare(4, 4_000) / 4, 4)
    assert more == pytest.approx(8, rel=0.15)
    assert common == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("found", [Chance(0.1, 1, 1, 0.0), Chance(0.1, 1, 3, 0.0, 0.0, 0.03, 2)])
def test_one_example_says_nothing(found):
    assert found.beyond(0.1) == 1
    assert found.half_width(0.05) == float("inf")


@pytest.mark.parametrize(
    "found", [Chance(0, 500, 3, 1e-4, 0.0, 0.3, 2), Chance(0, 500, 2, 1e-4, 0.0, 0.01, 1), Chance(0, 500, 1, 1e-4)]
)
def test_the_half_width_is_what_chance_goes_beyond_as_often_as_is_said(found):
    for level in (0.05, 0.001):
        assert found.beyond(found.half_width(level)) == pytest.approx(level, rel=1e-3)
    drawn = np.random.default_rng(5)
    luck = drawn.standard_t(found.freedom, 100_000) if found.seeds > 1 else np.zeros(100_000)
    means = found.of_examples**0.5 * drawn.normal(size=100_000) + found.of_seeds**0.5 * luck
    assert np.mean(np.abs(means) > found.half_width(0.05)) == pytest.approx(0.05, abs=0.004)


def test_simulated_comparisons_give_few_false_alarms_and_find_what_is_there():
    """A part of benchmarks/verdicts.py, which has 1,000 simulations of each world."""
    spec = spec_from_file_location("verdicts", Path(__file__).parents[2] / "benchmarks" / "verdicts.py")
    verdicts = sys.modules["verdicts"] = module_from_spec(spec)
    spec.loader.exec_module(verdicts)
    for world in (verdicts.World(2, 3, 300, 0.0), verdicts.World(2, 3, 300, 0.02), verdicts.World(4, 3, 300, 0.02)):
        found = verdicts.simulate(world, 60)
        assert found["false"] <= 0.14  # of 60 with a chance of 5%, more than 8 are one in 200
        assert found["found"] >= 0.8
