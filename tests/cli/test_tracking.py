"""`--track`: what the trackers' own libraries read back is what the run's events say."""

import importlib.util

import pytest

from command import assert_refused, deltatune
from deltatune.comparing.results import CellResult
from deltatune.training.events import Evaluated, Step, read_events


@pytest.fixture(scope="module")
def tracked(base, data, tmp_path_factory):
    """A short run that was told to every tracker that is installed here."""
    folder = tmp_path_factory.mktemp("tracked") / "run"
    here = [name for name in ("tensorboard", "mlflow", "trackio", "wandb") if importlib.util.find_spec(name)]
    words = ("--base", base, "--data", data, "--method", "head", "--training", "batch_tokens=128", "--epochs", 1)
    done = deltatune("tune", *words, *(word for name in here for word in ("--track", name)), "--out", folder, "--json")
    assert done.code == 0, done.err
    assert done.out.startswith("{"), "what trackers say is no data"
    return folder


@pytest.fixture(scope="module")
def expected(tracked):
    """Step → loss, and the accuracies on validation, as the events have them."""
    events = list(read_events(tracked / "events.jsonl"))
    losses = {event.step: event.loss for event in events if isinstance(event, Step)}
    assert len(losses) > 3
    return losses, [event.figures["accuracy"] for event in events if isinstance(event, Evaluated)]


@pytest.fixture(scope="module")
def accuracy(tracked):
    return CellResult.model_validate_json((tracked / "result.json").read_text()).quality


def test_tensorboard_reads_the_losses_and_the_test_figures(tracked, expected, accuracy):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    [run] = (tracked / "tracking" / "tensorboard").iterdir()
    events = reading.EventAccumulator(str(run))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert losses == pytest.approx(expected[0])
    assert [event.value for event in events.Scalars("validation/accuracy")] == pytest.approx(expected[1])
    assert events.Scalars("test/accuracy")[-1].value == pytest.approx(accuracy)
    assert events.Scalars("cost/trainable")[-1].value > 0


def test_mlflow_reads_the_losses_and_the_settings(tracked, expected, accuracy):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("alembic")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tracked / 'tracking' / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("run")
    [run] = client.search_runs([experiment.experiment_id])
    losses = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "train/loss")}
    assert losses == expected[0]
    assert run.data.metrics["test/accuracy"] == accuracy
    assert run.data.params["method"] == "head"
    assert run.info.status == "FINISHED"


def test_wandb_leaves_an_offline_run(tracked):
    pytest.importorskip("wandb")
    [run] = (tracked / "tracking" / "wandb" / "wandb").glob("offline-run-*/*.wandb")
    assert run.stat().st_size > 0


def test_trackio_leaves_its_database(tracked):
    pytest.importorskip("trackio")
    assert (tracked / "tracking" / "trackio" / "run.db").stat().st_size > 0


def test_a_tracker_that_is_not_there_is_named_with_what_to_install(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("deltatune.comparing.trackers.find_spec", lambda name: None if name == "wandb" else find(name))
    refused = deltatune("tune", "--track", "wandb", "--out", tmp_path / "run")
    assert_refused(refused, "tracking with wandb needs wandb", "pip install 'deltatune[wandb]'")
    assert not (tmp_path / "run").exists()
    assert_refused(deltatune("compare", "--track", "tensorbord", "--out", tmp_path), "tensorbord", "tensorboard")
