"""The command line in this process, where torch is loaded already, and data for it to work on."""

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


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


def deltatune(*words: object, stdin: str = "") -> Outcome:
    """Runs `deltatune` with these words as its command line."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["deltatune", *map(str, words)]
    with redirect_stdout(out), redirect_stderr(err), patch.object(sys, "argv", argv):
        with patch.object(sys, "stdin", io.StringIO(stdin)):
            try:
                main()
            except SystemExit as end:
                code = end.code
    return Outcome(int(code or 0), out.getvalue(), err.getvalue())


def write_table(path: Path, rows: Iterable[Iterable[object]]) -> Path:
    """Writes a CSV file and returns its path."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def reviews(count: int = 80) -> list[tuple[str, str]]:
    """Different short reviews with their labels in turn, in English and Korean."""
    good, bad = ("good", "great", "warm", "재미있다"), ("bad", "dull", "weak", "지루하다")
    subjects = itertools.product(("a", "the", "this", "정말"), ("film", "story", "plot", "cast", "영화"), ("very", "not very", "is"))
    texts = [" ".join(words) for words in subjects]
    return [
        (f"{texts[place // 2 % len(texts)]} {(bad, good)[place % 2][place // 2 % 4]} {place}", ("부정", "긍정")[place % 2])
        for place in range(count)
    ]
