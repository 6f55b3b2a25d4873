"""A search for settings before a comparison: the same for every method, on validation alone, and gone on with."""

import json
import math

import pytest
import yaml

from deltatune.comparing import trial as trials
from deltatune.comparing.experiment import TrialCell, make_experiment
from deltatune.comparing.search import Range, Search, Trial, read_searches
from deltatune.comparing.searching import propose
from deltatune.data import load_data
from deltatune.errors import UserError
from deltatune.training.classification import Classification
from runs import in_this_process, write_run

TRAINING = {"epochs": 1, "batch_tokens": 256, "evaluations": 1}


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A run with a search that came to its end, with the names of what ran in it."""
    run = write_run(
        tmp_path_factory.mktemp("place"),
        methods=["full", {"method": "lora", "search": {"rank": [2, 4, 8]}}],
        tuning={"trials": 3},
        training=TRAINING,
    )
    with in_this_process() as ran:
        assert run.start().code == 0
    return run, ran


def test_every_method_has_as_many_trials_of_as_many_steps_and_runs_with_what_did_best(searched):
    run, _ = searched
    found = read_searches(run.folder)
    assert [(one.label, len(one.trials)) for one in found] == [("full", 3), ("lora", 3)]
    assert len({trial.steps for one in found for trial in one.trials}) == 1
    for one in found:
        assert len({trial.settings["learning_rate"] for trial in one.trials}) == 3
        assert one.chosen.value == max(trial.value for trial in one.trials)
        assert one.seconds > one.train_seconds > 0
        spec = json.loads((run.cell(one.label) / "spec.json").read_text())
        assert spec["training"]["learning_rate"] == one.chosen.settings["learning_rate"]
        assert spec["method"]["options"].get("rank") == one.chosen.settings.get("rank")
        assert spec["seed"] == 0 != one.seed
    assert set(found[1].space) == {"learning_rate", "rank"}


def test_the_first_trial_has_the_settings_of_no_search(searched):
    full, lora = read_searches(searched[0].folder)
    assert full.trials[0].settings == {"learning_rate": 1e-4}
    assert lora.trials[0].settings == {"learning_rate": 1e-3, "rank": 8}
    rates = full.space["learning_rate"]
    assert (rates.low, rates.high, rates.log) == (pytest.approx(1e-5), pytest.approx(1e-3), True)


def test_a_search_that_was_cut_short_goes_on_with_the_trials_that_it_would_have_had(searched):
    run, first = searched
    whole = read_searches(run.folder)
    gone = [path for path in run.folder.glob("trials/*/result.json") if "trial0" not in str(path)]
    for path in gone:
        path.unlink()
    with in_this_process() as again:
        run.start()
    found = read_searches(run.folder)
    assert len(again) == len(gone) == 4
    assert set(again) <= set(first)
    for before, after in zip(whole, found, strict=True):
        assert [(t.settings, t.value) for t in before.trials] == [(t.settings, t.value) for t in after.trials]


def test_a_trial_has_no_test_split_to_read(searched, tmp_path, monkeypatch):
    run, seen = searched[0], []
    monkeypatch.setattr(Classification, "test", lambda *_: pytest.fail("the test split was read"))
    tune = trials.tune
    monkeypatch.setattr(trials, "tune", lambda base, data, *a, **k: (seen.append(data), tune(base, data, *a, **k))[1])
    experiment = make_experiment(yaml.safe_load((run.folder.parent / "experiment.yaml").read_text()))
    common = experiment.common(experiment.methods[0], "", "", "", None)
    result = trials.run_trial(TrialCell(**common, seed=1000, trial=0), tmp_path)
    assert len(load_data(experiment.data.name).test) > 0
    assert [len(data.test) for data in seen] == [0]
    assert result.value == result.validation["accuracy"]
    assert "test" not in json.loads((tmp_path / "result.json").read_text())


def test_a_trial_that_diverges_is_a_result_and_a_method_without_any_other_fails_with_the_reason(tmp_path):
    methods = ["head", {"method": "lora", "search": {"learning_rate": [1e30]}}]
    run = write_run(tmp_path, methods=methods, tuning=2, training={**TRAINING, "batch_tokens": 128})
    with in_this_process() as ran:
        done = run.start("--json")
    assert done.code == 1
    assert len(ran) == 5
    _, found = read_searches(run.folder)
    assert [trial.status for trial in found.trials] == ["failed", "failed"]
    assert found.chosen is None
    by_label = {record["label"]: record for record in json.loads(done.out)}
    assert (by_label["head"]["status"], by_label["lora"]["status"]) == ("done", "failed")
    assert "no trial of its search finished: training stopped at step 2: the loss is nan" in by_label["lora"]["reason"]


def test_later_trials_look_where_earlier_ones_did_well():
    space = {"learning_rate": Range(low=1e-5, high=1e-1, log=True)}
    search = Search(label="a", method="lora", space=space, budget=20, seed=5)
    for number in range(20):
        settings = propose(search, {})
        value = -abs(math.log10(settings["learning_rate"]) + 3)  # best at 1e-3
        trial = Trial(number=number, settings=settings, status="done", value=value, validation={"loss": 1})
        search = search.model_copy(update={"trials": (*search.trials, trial)})
    early, late = ([trial.value for trial in part] for part in (search.trials[:4], search.trials[10:]))
    assert sum(late) / len(late) > sum(early) / len(early)
    assert search.chosen.value > -0.3


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"tuning": {"trials": 2, "seed": 0}}, "seed 0 is one of the experiment's"),
        ({"methods": [{"method": "lora", "search": {"rank": [2]}}]}, "the experiment has no search"),
        ({"methods": [{"method": "lora", "search": {"rnk": [2]}}], "tuning": 2}, "no lora option named 'rnk'"),
        ({"methods": [{"method": "lora", "search": {"rank": [0]}}], "tuning": 2}, "rank must be at least 1"),
        ({"tuning": 0}, "tuning.trials"),
        ({"tuning": {"trials": 1, "sed": 0}}, "nearest: seed"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused_by_name(content, says):
    with pytest.raises(UserError) as refused:
        make_experiment(content)
    assert says in str(refused.value)
