import os
import resource
import subprocess
import sys

import pytest

from command import PROGRAM

COMMANDS = ("compare", "tune", "evaluate", "predict", "methods")
WIDE = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}


@pytest.mark.parametrize("command", [(), *((command,) for command in COMMANDS)], ids=" ".join)
def test_help_takes_less_than_a_second_and_shows_examples(command):
    took = []
    while len(took) < 3 and (not took or min(took) >= 1):  # processor time, so that a busy machine does not count
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([PROGRAM, *command, "--help"], capture_output=True, encoding="utf-8", env=WIDE)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(took) < 1
    assert (done.returncode, done.stderr) == (0, "")
    assert all(name in done.stdout for name in (COMMANDS if not command else ("Examples", f"deltatune {command[0]} ")))


def test_help_loads_neither_torch_nor_transformers():
    script = f"""
import sys
from deltatune.cli.main import main
for command in ([], *([name] for name in {COMMANDS})):
    sys.argv = ["deltatune", *command, "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code
print("loaded:", *({{"torch", "transformers", "datasets"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_without_a_command_there_is_help_and_an_exit_code_that_is_not_0():
    done = subprocess.run([PROGRAM], capture_output=True, encoding="utf-8", env=WIDE)
    assert all(name in done.stdout for name in COMMANDS)
    assert (done.returncode, done.stderr) == (2, "")
