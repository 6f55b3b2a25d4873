"""Several commands on one run folder. But in one test, cells are played: each takes a moment and leaves a result."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
from rich.console import Console

from command import PROGRAM
from deltatune.cli.live import LiveTable
from deltatune.cli.progress import RunProgress
from deltatune.comparing import sharing
from deltatune.comparing.experiment import make_experiment
from deltatune.comparing.locks import claimed, running
from deltatune.comparing.results import Elsewhere, FailedCell
from deltatune.comparing.sharing import Single, share
from deltatune.files import write_json
from runs import write_run

CELLS = make_experiment({"methods": ["full", "head", "lora"], "seeds": [0, 1, 2]}).cells()


class Played:
    """Stands in for the processes of one command: notes what it ran, and leaves results."""

    def __init__(self, folder, make_cell, log, fails=()):
        self.folder, self._make, self._log, self._fails = folder, make_cell, log, fails

    def run(self, cell):
        self._log.append(cell.id)
        time.sleep(0.03)
        folder = self.folder / cell.place
        if cell.id in self._fails:
            write_json(folder / "failed.json", {"reason": "it was to fail", "hint": ""})
        else:
            result = self._make(cell.method.label, cell.method.method, cell.seed, examples=10)
            write_json(folder / "result.json", result.model_dump(mode="json"))
        yield from ()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(sharing, "_WAIT", 0.01)


def test_each_cell_runs_once_and_every_command_ends_with_all_of_them(tmp_path, make_cell):
    logs, lanes = [[], []], [[Single(cell) for cell in CELLS] for _ in range(2)]
    told, elsewhere, began = [[], []], [[], []], time.time()

    def command(number):
        def watch(cell, news):
            if isinstance(news, Elsewhere):
                elsewhere[number].append(cell.id)
            else:
                told[number].append((cell.id, news.seed))

        share(lanes[number], Played(tmp_path, make_cell, logs[number]), watch, began)

    threads = [threading.Thread(target=command, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    time.sleep(0.02)
    later, later_on = [], time.time()
    assert Counter(logs[0] + logs[1]) == Counter(cell.id for cell in CELLS)
    assert min(map(len, logs)) > 0, "both ran some"
    for mine, heard in zip(lanes, told, strict=True):
        assert [(lane.result.label, lane.result.seed) for lane in mine] == [(c.method.label, c.seed) for c in CELLS]
        assert Counter(heard) == Counter((cell.id, cell.seed) for cell in CELLS)
    assert [Counter(cells) for cells in elsewhere] == [Counter(logs[1]), Counter(logs[0])], "what the other ran is told"
    share(
        [Single(cell) for cell in CELLS], Played(tmp_path, make_cell, []), lambda _, news: later.append(news), later_on
    )
    assert not any(isinstance(news, Elsewhere) for news in later), "a later command keeps what was there before"


def test_a_failed_cell_is_tried_once_by_a_command_and_again_by_the_next(tmp_path, make_cell):
    log, first = [], CELLS[0].id
    share(lanes := [Single(CELLS[0])], Played(tmp_path, make_cell, log, fails=[first]), lambda *_: None, time.time())
    assert isinstance(lanes[0].result, FailedCell)
    time.sleep(0.02)
    share(lanes := [Single(CELLS[0])], Played(tmp_path, make_cell, log), lambda *_: None, time.time())
    assert log == [first, first]
    assert lanes[0].result.label == "full"


def test_a_run_that_another_command_did_meanwhile_was_not_kept_from_before(make_cell, capfd):
    cells = make_experiment({"methods": ["head"], "seeds": [0, 1]}).cells()
    table = LiveTable(Console(file=io.StringIO(), height=40))
    with RunProgress() as lines:
        for cell, ahead in zip(cells, ([], [Elsewhere()]), strict=True):
            for news in (*ahead, make_cell("head", "head", cell.seed)):
                table.watch(cell, news)
                lines.watch(cell, news)
    console = Console(width=110, file=io.StringIO(), color_system=None)
    console.print(table._shown())
    kept, elsewhere, ended = (" ".join(line.split()) for line in console.file.getvalue().splitlines()[1:4])
    assert kept.startswith("head seed 0 kept accuracy")
    assert elsewhere.startswith("head seed 1 done elsewhere accuracy")
    assert ended.startswith("2 of 2 runs")
    before, meanwhile = capfd.readouterr().err.splitlines()
    assert before.endswith("kept from before")
    assert meanwhile.endswith("done meanwhile by another command")


HOLD = """
import sys, time
from pathlib import Path
from deltatune.comparing.locks import claimed
with claimed(Path(sys.argv[1])) as ours:
    print(ours, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_command_held_is_free(tmp_path):
    folder = tmp_path / "cells" / "one"
    words = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, encoding="utf-8") as holder:
        assert holder.stdout.readline() == "True\n"
        with claimed(folder) as ours:
            assert not ours
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        with claimed(folder) as ours:
            assert ours


def test_a_cell_that_outlives_its_command_is_waited_for(tmp_path):
    folder, order = tmp_path / "cells" / "one", []

    def second():
        with running(folder):
            order.append("second")

    with running(folder):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join(timeout=30)
    assert order == ["first", "second"]


def test_two_real_commands_on_one_folder_train_each_cell_once_and_end_with_one_report(tmp_path):
    run = write_run(tmp_path, methods=["head", "bitfit"], seeds=[0, 1], training={"epochs": 1, "batch_tokens": 256})
    words = [PROGRAM, *map(str, run.words), "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    with subprocess.Popen(words, **pipes) as one, subprocess.Popen(words, **pipes) as other:
        (out, said), (same, told) = (command.communicate(timeout=400) for command in (one, other))
    assert (one.returncode, other.returncode) == (0, 0), said + told
    records = json.loads(out)
    assert json.loads(same) == records
    assert [(record["label"], record["seed"], record["status"]) for record in records] == [
        (label, seed, "done") for label in ("head", "bitfit") for seed in (0, 1)
    ]
    trained = [
        [line.partition(":")[0] for line in lines.splitlines() if "s of training" in line] for lines in (said, told)
    ]
    assert sorted(trained[0] + trained[1]) == ["bitfit, seed 0", "bitfit, seed 1", "head, seed 0", "head, seed 1"]
    assert min(map(len, trained)) > 0, "both trained some"
    assert "kept from before" not in said + told
    assert (said + told).count("done meanwhile by another command") == 4
    assert len(list((run.folder / "cells").iterdir())) == 4
    assert not list(run.folder.glob("cells/*/failed.json"))
    page = (run.folder / "report.html").read_text()
    assert page.rstrip().endswith("</html>")
    assert all((run.folder / "plots" / name).is_file() for name in ("quality.svg", "quality.png"))
    assert [path.name for path in run.folder.glob("*.html")] == ["report.html"]
    assert sorted(path.name for path in run.folder.iterdir() if "plots" in path.name) == ["plots"]
