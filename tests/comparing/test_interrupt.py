"""`deltatune compare` in a terminal: what it shows there, Ctrl-C, a kill, and going on afterwards."""

import json
import os
import re
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from command import PROGRAM
from runs import in_this_process, processes, until, write_run


@dataclass(frozen=True)
class Stopped:
    """A command that was sent a signal while its second cell trained."""

    code: int
    out: str
    screen: str
    """All that it wrote on its terminal."""
    finished: dict[Path, int]
    """The files of the first cell with their times when the signal came."""


def trains(run, since):
    """Whether the second cell has taken some of its 128 steps since then."""
    files = [file for file in run.folder.glob("cells/lora*/events.jsonl") if file.stat().st_mtime > since]
    return any(file.read_text().count('"event": "step"') > 8 for file in files)


def stop(run, number):
    """Runs in a terminal until the second cell trains, and then sends the signal."""
    began = time.time()
    terminal, program = os.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [PROGRAM, *map(str, run.words)],
        stdout=subprocess.PIPE,
        stderr=program,
        env=environment,
        encoding="utf-8",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # these tests may run where it is ignored
    )
    os.close(program)
    screen = bytearray()

    def read():
        while True:
            try:
                screen.extend(os.read(terminal, 4096))
            except OSError:  # the other end is closed
                return

    reader = threading.Thread(target=read)
    reader.start()
    until(lambda: trains(run, began) or process.poll() is not None)
    finished = run.times("head")
    process.send_signal(number)
    out, _ = process.communicate(timeout=300)
    reader.join()
    os.close(terminal)
    assert not list(run.folder.glob("cells/lora*/result.json")), "the signal came before the second cell's end"
    return Stopped(process.returncode, out, screen.decode(), finished)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that gets Ctrl-C in its second cell, goes on, and is killed there."""
    settings = {"epochs": 8, "batch_tokens": 32, "evaluations": 1}
    run = write_run(tmp_path_factory.mktemp("place"), methods=["head", "lora"], training=settings)
    interrupted = stop(run, signal.SIGINT)
    survivors = processes(run.folder)
    killed = stop(run, signal.SIGKILL)
    until(lambda: not processes(run.folder))
    return run, interrupted, survivors, killed


def test_ctrl_c_ends_with_one_message_and_no_process_survives(stopped):
    _, interrupted, survivors, _ = stopped
    assert interrupted.code == 130
    assert interrupted.out == ""
    assert interrupted.screen.count("interrupted: finished runs are kept") == 1
    assert "Traceback" not in interrupted.screen
    assert survivors == []


def test_a_terminal_shows_loss_rate_and_time_left_while_a_cell_trains(stopped):
    _, interrupted, _, _ = stopped
    for shown in ("Method", "Loss", "Left", "lora", "seed 0", "training", "/128"):
        assert shown in interrupted.screen
    assert re.search(r"\d/128 +0\.\d{3} ", interrupted.screen), "a step with its loss"
    assert re.search(r"\d of 2 runs, \S.* left", interrupted.screen)


def test_after_ctrl_c_and_a_kill_the_same_command_goes_on(stopped, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run, interrupted, _, killed = stopped
    assert killed.code == -signal.SIGKILL
    with in_this_process():
        done = run.start("--json")
    assert done.code == 0
    assert [record["status"] for record in json.loads(done.out)] == ["done", "done"]
    assert run.times("head") == interrupted.finished == killed.finished
    assert "head, seed 0: accuracy" in done.err
    assert "kept from before" in done.err.splitlines()[0]
