"""Methods of one size, chosen by counting."""

import pytest

from deltatune.comparing.experiment import make_experiment
from deltatune.comparing.match import match, nearest
from deltatune.data import load_data
from deltatune.errors import UserError
from deltatune.models.places import find_base
from deltatune.planning.foresight import foresee
from runs import write_run


@pytest.mark.parametrize("wanted", [0, 1, 7, 100, 101, 5000])
@pytest.mark.parametrize(
    "size_of",
    [
        lambda k: 10 * k,
        lambda k: 10 * k if k <= 48 else None,
        lambda k: 10 * k if k >= 8 else None,
        lambda k: 4096 // k,
        lambda k: k * k + 3,
    ],
    ids=["linear", "up to 48", "from 8", "falling", "square"],
)
def test_the_nearest_size_is_found_whichever_way_it_grows(size_of, wanted):
    best = min((k for k in range(1, 10_000) if size_of(k) is not None), key=lambda k: abs(size_of(k) - wanted))
    assert abs(size_of(nearest(size_of, wanted)) - wanted) == abs(size_of(best) - wanted)


def test_nothing_that_fits_is_none():
    assert nearest(lambda _: None, 10) is None


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("place"))
    return run.folder.parent


@pytest.mark.parametrize("by", ["parameters", "bytes"])
def test_every_method_with_a_size_comes_as_near_as_it_can(place, by):
    methods = ["lora:rank=4", "loha:rank=1", "pfeiffer", "prompt", "bitfit", {"method": "dora", "label": "mine"}]
    experiment = make_experiment({"methods": methods, "match": by, "base": str(place / "base")})
    base, data = find_base(experiment.base), load_data(str(place / "reviews.csv"))
    matched, found = match(experiment, base, data)
    by_label = {one.label: one for one in found}
    assert by_label["lora (rank=4)"].ratio == 1
    assert by_label["loha (rank=2)"].ratio == 1  # twice LoRA's for a rank
    assert (by_label["mine"].setting, by_label["mine"].value) == ("rank", 3)  # with its magnitudes
    assert by_label["prompt"].setting == "virtual_tokens"
    assert (by_label["bitfit"].setting, by_label["bitfit"].value) == ("", None)
    assert by_label["bitfit"].ratio < 1
    assert all(one.to == "lora (rank=4)" and one.by == by for one in found)
    assert [choice.options.get("rank") for choice in matched.methods][:2] == [4, 2]
    assert matched.match is None


@pytest.mark.parametrize(("by", "method"), [("memory", "loha"), ("time", "dora")])
def test_what_is_planned_of_a_run_is_matched_as_near_as_the_plans_of_its_cells_allow(place, by, method):
    content = {"methods": ["lora:rank=4", method], "match": by, "base": str(place / "base"), "seeds": [1, 0]}
    experiment = make_experiment({**content, "training": {"batch_tokens": 256}})
    base, data = find_base(experiment.base), load_data(str(place / "reviews.csv")).limited(24, 8, 8, seed=0)

    def planned(choice):
        found = foresee(base, data, choice.make(), experiment.training, seed=1, forked=True).plan
        return found.memory.peak if by == "memory" else found.seconds

    matched, [reference, found] = match(experiment, base, data)
    wanted, reached = map(planned, matched.methods)
    assert (found.wanted, found.reached, found.setting) == (wanted, reached, "rank")
    assert reference.ratio == 1
    near = [planned(matched.methods[1].resized("rank", k)) for k in (found.value - 1, found.value + 1) if k]
    assert all(abs(reached - wanted) <= abs(other - wanted) for other in near)
    assert reached != planned(experiment.methods[1]), "it was resized"
    assert len({reached, *near}) > 1, "the rank matters to it"


def test_a_reference_that_is_not_there_or_has_nothing_is_refused(place):
    with pytest.raises(UserError, match="no method among the experiment's named 'lorra'"):
        make_experiment({"methods": ["lora"], "match": {"by": "parameters", "to": "lorra"}})
    experiment = make_experiment({"methods": ["head", "lora"], "match": "bytes", "base": str(place / "base")})
    with pytest.raises(UserError, match="head trains nothing beside the head"):
        match(experiment, find_base(experiment.base), load_data(str(place / "reviews.csv")))
