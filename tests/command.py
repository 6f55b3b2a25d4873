"""The command line, run in this process where torch is loaded already, and data for it to work on."""

import csv
import io
import itertools
import sys
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from deltatune.cli.main import main

PROGRAM = str(Path(sys.executable).with_name("deltatune"))
"""The installed command, for a process of its own."""


@dataclass(frozen=True)
class Outcome:
    """What a command came to."""

    code: int
    out: str
    err: str


def deltatune(*words: object, stdin: bytes | str = b"") -> Outcome:
    """Runs `deltatune` with these words as its command line."""
    out, err = io.StringIO(), io.StringIO()
    given = io.TextIOWrapper(io.BytesIO(stdin.encode() if isinstance(stdin, str) else stdin))
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        patch.multiple(sys, argv=["deltatune", *map(str, words)], stdin=given),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code
    return Outcome(int(code or 0), out.getvalue(), err.getvalue())


def assert_refused(outcome: Outcome, error: str = "", hint: str = "") -> None:
    """One message with a hint on stderr, nothing on stdout, an exit code that says so."""
    first, *rest = outcome.err.strip().splitlines()
    assert first.startswith("error: ")
    assert error in first
    assert [line[:6] for line in rest] == ["hint: "], outcome.err
    assert hint in rest[0]
    assert outcome.out == ""
    assert outcome.code in (1, 2)


def write_table(path: Path, rows: Iterable[Iterable[object]]) -> Path:
    """Writes a CSV file and returns its path."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def write_reviews(path: Path, count: int = 80) -> Path:
    """Writes so many different reviews with the labels 부정 and 긍정 in turn."""
    return write_table(path, [("text", "label"), *reviews(count)])


def reviews(count: int = 80) -> list[tuple[str, str]]:
    """Different short reviews with their labels in turn, in English and Korean."""
    opinions = {"부정": ("bad", "dull", "weak", "지루하다"), "긍정": ("good", "great", "warm", "재미있다")}
    subjects = itertools.product(("a", "the", "this", "정말"), ("film", "story", "cast", "영화"), ("is", "was", "not"))
    pairs = ((subject, *opinion) for subject in itertools.cycle(tuple(subjects)) for opinion in opinions.items())
    return [
        (" ".join((*subject, words[place // 2 % len(words)], str(place))), label)
        for place, (subject, label, words) in enumerate(itertools.islice(pairs, count))
    ]
