"""What a terminal, a pipe and a closed pipe get to see."""

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

import pytest

from command import PROGRAM, deltatune
from deltatune.cli.main import main


@pytest.mark.parametrize(
    ("setting", "colours"), [({}, True), ({"NO_COLOR": "1"}, False)], ids=["by default", "NO_COLOR"]
)
def test_errors_are_red_in_a_terminal_unless_no_color_is_set(setting, colours):
    terminal, program = os.openpty()
    settings = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    done = subprocess.run([PROGRAM, "comapre"], stderr=program, env={**settings, "TERM": "xterm", **setting})
    os.close(program)
    with os.fdopen(terminal, "rb") as screen:
        said = screen.read1().decode()
    assert done.returncode == 2
    assert "error:" in said
    assert ("31m" in said) == colours


def test_a_piped_table_is_not_cut_to_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = deltatune("methods").out.splitlines()
    assert max(map(len, lines)) > 100
    assert any("arXiv 2106.09685" in line for line in lines)
    assert not any("\x1b" in line or "…" in line for line in lines)


def test_a_reader_that_goes_away_such_as_head_is_no_error(tuned):
    reading, writing = os.pipe()
    os.close(reading)
    words = ["deltatune", "predict", str(tuned.folder)]
    given = io.TextIOWrapper(io.BytesIO(b"a good film\n" * 2000))
    with (
        os.fdopen(writing, "w") as pipe,
        redirect_stdout(pipe),
        redirect_stderr(io.StringIO()) as talk,
        patch.multiple(sys, argv=words, stdin=given),
        pytest.raises(SystemExit) as end,
    ):
        main()
    assert talk.getvalue() == ""
    assert end.value.code == 141  # 128 + SIGPIPE, as of any program in a pipeline
