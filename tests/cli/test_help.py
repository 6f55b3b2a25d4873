import os
import resource
import subprocess
import sys

import pytest

from command import PROGRAM

COMMANDS = (
    "compare",
    "watch",
    "merge-runs",
    "tune",
    "evaluate",
    "predict",
    "chat",
    "merge",
    "methods",
    "plan",
    "recommend",
    "doctor",
    "data show",
)
FIRST_WORDS = [words.split()[0] for words in COMMANDS]
WIDE = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}


def processor_seconds(*command: str) -> tuple[float, subprocess.CompletedProcess]:
    """What the command costs, and what it says; on a busy machine wall clocks measure the others."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=WIDE)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


SMALLEST = """
import typer
app = typer.Typer(rich_markup_mode="markdown")
for name in ("one", "two"):
    app.command(name, epilog="**Examples**")(lambda name: None)
app()
"""


@pytest.mark.parametrize("command", [(), *(tuple(words.split()) for words in COMMANDS)], ids=" ".join)
def test_help_takes_less_than_a_second_and_shows_examples(command):
    took, done = processor_seconds(PROGRAM, *command, "--help")
    if took >= 1:
        # A machine may be slow as a whole: then a second is what help costs the smallest program with commands, twice.
        again = min(took, processor_seconds(PROGRAM, *command, "--help")[0])
        words = (sys.executable, "-c", SMALLEST, *(["one"] if command else []), "--help")
        assert again < max(1, 2 * min(processor_seconds(*words)[0] for _ in range(2)))
    assert (done.returncode, done.stderr) == (0, "")
    expected = ("Examples", f"deltatune {' '.join(command)} ") if command else FIRST_WORDS
    assert all(name in done.stdout for name in expected)


def test_help_loads_neither_torch_nor_transformers():
    script = f"""
import sys
from deltatune.cli.main import main
for command in ("", *{COMMANDS}):
    sys.argv = ["deltatune", *command.split(), "--help"]
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
    assert all(name in done.stdout for name in FIRST_WORDS)
    assert (done.returncode, done.stderr) == (2, "")
