"""The embedded data set `docstrings`: functions of Python's own standard library, and what their docstrings say first.

Nothing is fetched: the sources are read, not run, from where the running Python has its standard library.
"""

import ast
import gc
import hashlib
import platform
import re
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from deltatune.data.dialogues import Dialogue, DialogueData, Dialogues, Turn
from deltatune.errors import UserError

INSTRUCTION = "Write the first line of the docstring of this Python function."

_LEFT_OUT = {
    *("site-packages", "dist-packages", "lib-dynload"),  # not the standard library, or not Python
    *("test", "tests", "idle_test", "turtledemo", "__phello__"),  # no code that anyone would document
    *("tkinter", "turtle", "idlelib"),  # wrappers of a graphics toolkit that not every Python has
    *("distutils", "lib2to3", "ensurepip", "pydoc_data", "encodings"),  # discarded, or tables
}
_CHARACTERS = range(40, 301)
"""Of a source without its docstring: more than a line, and so few that nine of ten examples have at most 128 tokens."""
_WORDS = range(4, 21)
"""Of a first line."""
_SENTENCE = re.compile(r"[A-Z](?!.*(\w\(|->|>>>)).*\.")
"""Begins and ends as a sentence does, and shows no signature, call or session."""


@dataclass(frozen=True)
class _Function:
    module: str
    source: str
    line: str


@cache
def docstrings() -> DialogueData:
    """Functions of the standard library with the first lines of their docstrings; no module is in two splits.

    Each is a chat: the user gives an instruction and a function without its docstring, the assistant answers with the
    line. Kept are functions of modules and methods of classes whose source has 40 to 300 characters and whose first
    line is a sentence of 4 to 20 words; of those with the same source, or the same line but for its case, the first.
    Raises UserError where this Python has no sources.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    with _no_collection():
        found = list(_functions(folder))
    kept = list(_distinct(found))
    if not kept:
        raise UserError(f"there are no sources of the standard library in {folder}", "use a Python that has them")
    splits: dict[str, list[Dialogue]] = {"train": [], "validation": [], "test": []}
    for row, function in enumerate(kept, 1):
        asked = Turn("user", f"{INSTRUCTION}\n\n{function.source}", scored=False)
        answer = Turn("assistant", function.line, scored=True)
        splits[_split_of_module(function.module)].append(Dialogue((asked, answer), row))
    digest = hashlib.sha256("".join(f"{one.source}\0{one.line}\0" for one in kept).encode()).hexdigest()
    return DialogueData(
        name="docstrings",
        revision=f"Python {platform.python_version()}, sha256 {digest[:16]}",
        labels=(),
        train=Dialogues(splits["train"]),
        validation=Dialogues(splits["validation"]),
        test=Dialogues(splits["test"]),
        text=("source",),
        label="docstring",
        splitting="divided by module (about 80/10/10, by the SHA-256 of its name), so that no module is in two splits",
        duplicates=len(found) - len(kept),
    )


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps Python from looking for garbage in syntax trees, which takes two fifths of the time and finds none."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _functions(folder: Path) -> Iterator[_Function]:
    """Every function with a fit source and a fit first line, in the order of files and lines."""
    for path in _sources(folder):
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (OSError, ValueError, SyntaxError):  # not ours to mend
            continue
        lines = text.splitlines()
        for node in _definitions(tree.body):
            if function := _function(path.relative_to(folder).with_suffix("").parts[0], node, lines):
                yield function


def _sources(folder: Path) -> Iterator[Path]:
    """The modules below a folder in the order of their names."""
    for path in sorted(folder.iterdir()):
        if path.stem in _LEFT_OUT:
            continue
        if path.is_dir():
            yield from _sources(path)
        elif path.suffix == ".py":
            yield path


def _definitions(body: Iterable[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The functions of a module and the methods of its classes; not the functions inside functions."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node.body)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _function(module: str, node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> _Function | None:
    said = (ast.get_docstring(node) or "").partition("\n")[0].strip()
    if len(said.split()) not in _WORDS or not _SENTENCE.fullmatch(said):
        return None
    docstring = node.body[0]
    if len(node.body) == 1 or docstring.lineno == node.lineno:
        return None
    source = "\n".join([*lines[node.lineno - 1 : docstring.lineno - 1], *lines[docstring.end_lineno : node.end_lineno]])
    source = textwrap.dedent(source).strip()
    return _Function(module, source, said) if len(source) in _CHARACTERS else None


def _distinct(functions: Iterable[_Function]) -> Iterator[_Function]:
    """Drops whatever repeats a source or a line, so that no answer of one split stands in another."""
    met: set[str] = set()
    for function in functions:
        keys = {" ".join(function.source.split()), function.line.casefold()}
        if met.isdisjoint(keys):
            met |= keys
            yield function


def _split_of_module(module: str) -> str:
    """`_pydecimal` and `decimal` are one module in two languages."""
    name = module.removeprefix("_py").lstrip("_")
    bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10
    return {6: "validation", 1: "test"}.get(bucket, "train")  # the two buckets that hold most nearly a tenth
