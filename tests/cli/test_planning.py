"""Plans on the command line: what does not fit is refused, what cannot be planned runs, and trials are evidence."""

import json
from dataclasses import replace

import pytest

from command import assert_refused, deltatune
from deltatune.comparing.cell import SPEC
from deltatune.comparing.compare import _warning
from deltatune.comparing.worker import attempt
from deltatune.files import write_json
from deltatune.planning import calibration
from deltatune.planning import recommend as recommending
from deltatune.training.events import Unplanned

SHORT = ("--epochs", 1, "--training", "batch_tokens=128", "--training", "evaluations=1")


@pytest.fixture
def small_machine(tmp_path, monkeypatch):
    """A machine, for this process and those it starts, with far less memory than a process takes."""
    monkeypatch.setenv("DELTATUNE_CACHE", str(tmp_path / "cache"))
    path = calibration._path()
    path.parent.mkdir(parents=True)
    write_json(path, replace(calibration._guessed(), memory=2**20).as_json())


def test_a_comparison_that_cannot_fit_is_refused_and_force_runs_it(
    small_machine, base, data, tmp_path, monkeypatch
) -> None:
    def run(processes, cell):  # in this process
        events = []
        write_json(processes.folder / cell.place / SPEC, cell.model_dump(mode="json"))
        attempt(processes.folder / cell.place, events.append, force="--force" in processes._words, forked=True)
        yield from events

    monkeypatch.setattr("deltatune.comparing.processes.CellProcesses.run", run)
    words = ("compare", "--base", base, "--data", data, "--method", "lora:rank=2", *SHORT, "--out", tmp_path / "run")
    refused = deltatune(*words)
    assert refused.code == 1
    assert "failed: this run would take 0." in refused.err
    assert "--force tries it all the same" in refused.err
    forced = deltatune(*words, "--force", "--json")
    assert forced.code == 0, forced.err
    [run] = json.loads(forced.out)
    assert run["method"] == "lora"


def test_a_tuning_that_cannot_fit_is_refused_and_force_runs_it(small_machine, base, data, tmp_path) -> None:
    words = ("tune", "--base", base, "--data", data, "--method", "lora", *SHORT, "--out", tmp_path / "tuned")
    assert_refused(deltatune(*words), "this run would take", "--force")
    assert deltatune(*words, "--force").code == 0


def test_a_run_that_cannot_be_planned_goes_on_and_says_why_in_a_line(base, data, tmp_path, monkeypatch, caplog) -> None:
    def foresee(*_, **__):
        raise RuntimeError("an odd\narchitecture")

    monkeypatch.setattr("deltatune.comparing.cell.foresee", foresee)
    done = deltatune("tune", "--base", base, "--data", data, *SHORT, "--out", tmp_path / "tuned")
    assert done.code == 0
    assert caplog.messages.count("no plan could be made: RuntimeError: an odd architecture") == 1
    first = json.loads((tmp_path / "tuned" / "events.jsonl").read_text().splitlines()[0])
    assert first == {"event": "unplanned", "reason": "RuntimeError: an odd architecture"}


def test_a_comparison_says_once_of_a_method_that_it_is_not_planned(caplog) -> None:
    from deltatune.comparing.experiment import make_experiment

    seen = []
    watch = _warning(lambda cell, news: seen.append(news))
    for cell in make_experiment({"methods": ["lora"], "seeds": [0, 1]}, "x").cells():
        watch(cell, Unplanned("an odd architecture"))
    assert len(seen) == 2
    assert caplog.messages == ["lora: no plan could be made: an odd architecture"]


@pytest.fixture
def few(monkeypatch) -> None:
    guide = {name: recommending.GUIDE[name] for name in ("lora", "full", "head")}
    monkeypatch.setattr(recommending, "GUIDE", guide)


def test_trials_are_evidence_for_a_recommendation(few, base, data) -> None:
    done = deltatune("recommend", "--base", base, "--data", data, *SHORT, "--trial", "3s", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert {one["evidence"] for one in found["candidates"]} == {"a trial of 1 s"}
    qualities = [one["quality"] for one in found["candidates"]]
    assert qualities == sorted(qualities, reverse=True)
    assert all(0 <= quality <= 1 for quality in qualities)
    assert found["command"].startswith(f"deltatune tune --base {base} --data {data} --method ")


def test_a_trial_that_fails_puts_its_method_out(few, base, data) -> None:
    rate = ("--training", "learning_rate=1e30", "--training", "clip=0")
    done = deltatune("recommend", "--base", base, "--data", data, *SHORT, *rate, "--trial", "3s", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert "its trial failed: training stopped" in found["candidates"][-1]["out"]


def test_runs_are_evidence_for_a_recommendation(few, base, data, tmp_path) -> None:
    for method in ("head", "lora"):
        words = ("--method", method, *SHORT, "--out", tmp_path / method)
        assert deltatune("tune", "--base", base, "--data", data, *words).code == 0
    sources = ("--from", tmp_path / "head", "--from", tmp_path / "lora")
    done = deltatune("recommend", "--base", base, "--data", data, *SHORT, *sources, "--json")
    assert done.code == 0, done.err
    found = {one["method"]: one for one in json.loads(done.out)["candidates"]}
    for method in ("head", "lora"):
        result = json.loads((tmp_path / method / "result.json").read_text())
        assert found[method]["quality"] == result["test"][result["metric"]]
        assert found[method]["evidence"] == "measured in 1 run"
    assert found["full"]["quality"] is None
    assert found["full"]["evidence"].startswith("guide: ")
    assert_refused(
        deltatune("recommend", "--base", base, "--data", data, "--from", tmp_path), "has no finished run", "compare"
    )


@pytest.mark.parametrize("command", ["plan", "recommend"])
def test_a_setting_that_does_not_exist_is_named(command: str, base) -> None:
    assert_refused(deltatune(command, "--base", base, "--training", "batch_token=1"), "batch_token", "batch_tokens")
