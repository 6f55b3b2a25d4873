"""`deltatune compare` from end to end, on a tiny base, with every cell in a process of its own where that matters."""

import csv
import html
import json
import os
import signal
import threading
from dataclasses import dataclass

import pytest
import yaml

from command import Outcome, deltatune, write_reviews
from deltatune.comparing import cell as cells_of_a_run
from deltatune.comparing import table
from deltatune.comparing.results import CellResult
from deltatune.training.events import Finished, Planned, Started, Step, read_events
from runs import Run, cell_processes, in_this_process, until, without_report, write_run


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Cells compute with one thread, as this process does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@dataclass(frozen=True)
class Story:
    """A run whose first cell was killed from outside; the same command then ran again."""

    run: Run
    first: Outcome
    report: str
    """As it stood after the first command."""
    table: str
    kept: dict
    """The files of the second cell with their times, between the commands."""
    second: Outcome


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    run = write_run(place, methods=["full", "lora:rank=4"], training={"epochs": 2, "batch_tokens": 128})
    killer = threading.Thread(target=lambda: os.kill(*until(lambda: cell_processes(run.folder)), signal.SIGKILL))
    killer.start()
    first = run.start()
    killer.join()
    report, table = (run.folder / "report.html").read_text(), (run.folder / "results.csv").read_text()
    kept = run.times("lora-rank-4")
    with without_report():
        second = run.start()
    return Story(run, first, report, table, kept, second)


def test_a_failed_cell_is_shown_with_its_reason_and_the_others_go_on(story):
    reason = "the process was killed"
    assert all(reason in shown for shown in (story.report, story.table, story.first.out, story.first.err))
    assert "lora (rank=4), seed 0: accuracy" in story.first.err
    assert "error: 1 of 2 runs failed" in story.first.err
    assert "hint: run the same command again" in story.first.err
    assert story.first.code == 1


def test_a_failed_cell_is_tried_again_and_a_finished_one_is_kept(story):
    assert story.second.code == 0
    assert story.second.err.count("kept from before") == 1
    assert story.run.times("lora-rank-4") == story.kept
    assert not (story.run.cell("full") / "failed.json").exists()


def test_a_run_leaves_the_folder_that_the_design_shows(story):
    assert story.second.code == 0
    entries = {str(path.relative_to(story.run.folder)) for path in story.run.folder.iterdir()} - {".locks"}
    tables = {"results.csv", "results.parquet", "results.md"}
    assert entries == {"experiment.yaml", "cells", "report.html", "plots"} | tables
    for cell in (story.run.folder / "cells").iterdir():
        assert {path.name for path in cell.iterdir()} == {
            *("spec.json", "events.jsonl", "result.json", "predictions.jsonl", "adapter", "stderr.log"),
        }
        assert (cell / "adapter" / "adapter_model.safetensors").is_file()
        assert (cell / "stderr.log").read_text() == ""
    assert any((story.run.folder / "plots").iterdir())


def test_experiment_yaml_has_every_default_revisions_versions_and_the_machine(story):
    written = yaml.safe_load((story.run.folder / "experiment.yaml").read_text())
    assert written["training"]["warmup"] == 0.06
    assert written["methods"][1]["options"]["targets"] == "all-linear"
    resolved = written["resolved"]
    assert resolved["base"]["id"] == str(story.run.folder.parent / "base")
    assert resolved["data"]["revision"].startswith("sha256:")
    assert resolved["data"]["labels"] == ["긍정", "부정"]
    assert (resolved["data"]["train"], resolved["data"]["validation"], resolved["data"]["test"]) == (64, 8, 8)
    assert set(resolved["learning rates"]) == {"full", "lora (rank=4)"}
    assert {"deltatune", "torch", "transformers"} <= set(resolved["versions"])
    assert resolved["machine"]["cores"] == os.cpu_count()


def test_every_run_records_its_plan_beside_what_it_took(story: Story) -> None:
    cells = [*(story.run.folder / "cells").iterdir()]
    for cell in cells:
        plans = [event for event in read_events(cell / "events.jsonl") if isinstance(event, Planned)]
        result = json.loads((cell / "result.json").read_text())
        assert [plan.peak_bytes for plan in plans] == [result["planned_peak_bytes"]]
        assert [plan.seconds for plan in plans] == [result["planned_seconds"]]
        assert 0 < result["training_peak_bytes"] <= result["peak_bytes"]
    assert cells


def test_the_report_puts_what_was_planned_of_a_run_beside_what_it_took(story: Story) -> None:
    result = json.loads((story.run.cell("lora-rank-4") / "result.json").read_text())
    for what, tell, measured, planned in (
        ("time", table.seconds, result["train_seconds"], result["planned_seconds"]),
        ("memory", table.size, result["training_peak_bytes"], result["planned_peak_bytes"]),
    ):
        share = f"{planned / measured - 1:+.0%}".replace("-", "−")
        said = f"lora (rank=4): {tell(measured)}, planned {tell(planned)} ({share})"
        assert said in html.unescape(story.report)
        assert f"Planned and measured {what}" in story.report
        assert tell(planned) in (story.run.folder / "plots" / f"planned-{what}.svg").read_text()
    assert 0.5 < result["planned_peak_bytes"] / result["training_peak_bytes"] < 2


def test_every_method_takes_the_same_steps_over_the_same_examples(story):
    runs = [list(read_events(cell / "events.jsonl")) for cell in (story.run.folder / "cells").iterdir()]
    started = [event for run in runs for event in run if isinstance(event, Started)]
    planned = {(event.steps, event.examples, event.epochs) for event in started}
    seen = {
        [(event.step, event.examples, event.tokens) for event in run if isinstance(event, Step)][-1] for run in runs
    }
    done = {run[-1].steps for run in runs if isinstance(run[-1], Finished)}
    assert len(runs) == 2
    assert len(planned) == len(seen) == len(done) == 1


def test_results_csv_and_the_table_show_what_the_cells_measured(story):
    with (story.run.folder / "results.csv").open(encoding="utf-8", newline="") as file:
        lines = {line["label"]: line for line in csv.DictReader(file)}
    for label, folder in {"full": story.run.cell("full"), "lora (rank=4)": story.run.cell("lora-rank-4")}.items():
        result = CellResult.model_validate_json((folder / "result.json").read_text())
        assert float(lines[label]["accuracy"]) == result.quality
        files = [path for path in (folder / "adapter").iterdir() if path.name != "README.md"]
        assert int(lines[label]["adapter_bytes"]) == sum(path.stat().st_size for path in files)
        assert result.peak_bytes > result.baseline_bytes > 0
        assert f"{100 * result.quality:.1f}%" in story.second.out
    assert float(lines["full"]["train_share_of_full"]) == 1


def test_stdout_has_the_whole_table_and_stderr_the_talk(story):
    header = story.second.out.splitlines()[0]
    assert header.split()[-1] == "Adapter"
    assert "…" not in story.second.out
    assert f"report: {story.run.folder}/report.html" in story.second.err
    assert "full, seed 0: accuracy" in story.second.err


def test_a_cell_in_its_process_gives_the_same_bytes_as_in_this_one(story, tmp_path):
    training = ("--epochs", 2, "--training", "batch_tokens=128")
    spec = json.loads((story.run.cell("lora-rank-4") / "spec.json").read_text())
    words = ("--base", spec["base"], "--data", spec["data"]["name"], "--set", "rank=4", *training)
    deltatune("tune", *words, "--out", tmp_path)
    here, there = (
        (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        for folder in (tmp_path, story.run.cell("lora-rank-4"))
    )
    assert here == there


def test_what_a_cell_saved_scores_as_its_result_says(story):
    result = json.loads((story.run.cell("lora-rank-4") / "result.json").read_text())
    scores = json.loads(deltatune("evaluate", story.run.cell("lora-rank-4"), "--json").out)
    assert (scores["accuracy"], scores["loss"]) == (result["test"]["accuracy"], result["test"]["loss"])


def test_the_runs_own_experiment_yaml_starts_the_same_cells(story):
    before = story.run.times("full") | story.run.times("lora-rank-4")
    with without_report():
        own = deltatune("compare", story.run.folder / "experiment.yaml", "--out", story.run.folder, "--json")
    assert [(record["label"], record["status"]) for record in json.loads(own.out)] == [
        ("full", "done"),
        ("lora (rank=4)", "done"),
    ]
    assert own.err.count("kept from before") == 2
    assert story.run.times("full") | story.run.times("lora-rank-4") == before


@pytest.fixture
def without_processes():
    with in_this_process():
        yield


def test_a_cell_that_diverges_says_where(tmp_path):
    run = write_run(tmp_path, methods=["lora:learning_rate=1e30"], training={"batch_tokens": 128})
    with in_this_process(report=True):
        done = run.start("--json")
    [record] = json.loads(done.out)
    assert record["status"] == "failed"
    assert record["reason"].startswith("training stopped at step 2: the loss is nan")
    assert "lower the learning rate" in record["hint"]
    assert record["reason"] in (run.folder / "report.html").read_text()
    assert done.code == 1


def test_changed_data_are_new_cells_and_the_old_ones_stay(tmp_path, without_processes):
    run = write_run(tmp_path, methods=["head"], training={"epochs": 1})
    [first] = json.loads(run.start("--json").out)
    write_reviews(tmp_path / "reviews.csv", count=120)
    [second] = json.loads(run.start("--json").out)
    assert (first["test_examples"], second["test_examples"]) == (8, 12)
    assert len(list((run.folder / "cells").iterdir())) == 2


def test_flags_and_a_file_that_say_the_same_make_the_same_cells(tmp_path, without_processes):
    methods = ["head", "lora:rank=4,targets=attention"]
    run = write_run(tmp_path, methods=methods, seeds=[0, 1], training={"epochs": 1})
    from_file = run.start("--json")
    results = {path: path.stat().st_mtime_ns for path in (run.folder / "cells").glob("*/result.json")}
    flags = [word for method in methods for word in ("--method", method)] + ["--seed", 0, "--seed", 1, "--epochs", 1]
    named = ("--base", tmp_path / "base", "--data", tmp_path / "reviews.csv")
    from_flags = deltatune("compare", *named, *flags, "--out", run.folder, "--json")
    assert len(results) == 4
    assert {path: path.stat().st_mtime_ns for path in (run.folder / "cells").glob("*/result.json")} == results
    assert from_flags.out == from_file.out


def test_cells_of_different_code_are_told_in_the_terminal_and_in_the_report(tmp_path, monkeypatch, caplog):
    run = write_run(tmp_path, methods=["head", "norms"], training={"epochs": 1})
    with in_this_process():
        monkeypatch.setattr(cells_of_a_run, "code_mark", lambda: "0.0.9-before")
        run.start("--method", "head")
    assert "different code" not in caplog.text
    with in_this_process(report=True):
        monkeypatch.setattr(cells_of_a_run, "code_mark", lambda: "0.1.0-after")
        run.start()
    words = (
        "These runs are of different code: 0.0.9-before ran head (seed 0); 0.1.0-after ran norms (seed 0). What "
        "differs between them may come from that; a new folder would run all with one."
    )
    assert words in caplog.messages, "which the command line shows on stderr"
    assert words in html.unescape((run.folder / "report.html").read_text())
    assert words in (run.folder / "results.md").read_text()


def test_a_damaged_result_is_run_again(tmp_path, without_processes):
    run = write_run(tmp_path, methods=["head"], training={"epochs": 1})
    first = run.start("--json")
    result = run.cell("head") / "result.json"
    result.write_text(result.read_text()[:100])
    again = run.start("--json")
    assert json.loads(again.out)[0]["test_loss"] == json.loads(first.out)[0]["test_loss"]
    assert "kept from before" not in again.err
