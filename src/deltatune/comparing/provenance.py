"""What code a result came from, so that results of different code are not taken for one comparison."""

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import deltatune

if TYPE_CHECKING:
    from deltatune.comparing.results import CellResult

LIBRARIES = ("deltatune", "torch", "transformers", "tokenizers", "datasets")
"""Whose versions a run records."""


@cache
def code_mark() -> str:
    """The version of Deltatune and a digest of its source files as they are: `0.1.0-3f9a1c2b4d5e`."""
    root = Path(deltatune.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        digest.update(f"{path.relative_to(root).as_posix()} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return f"{version('deltatune')}-{digest.hexdigest()[:12]}"


def versions() -> dict[str, str]:
    """The versions of the libraries that decide what a run computes."""
    return {name: version(name) for name in LIBRARIES}


def different_code(cells: "Sequence[CellResult]") -> str:
    """A sentence that says which code ran which of these cells; empty where one ran them all."""
    made: dict[str, dict[str, dict[int, None]]] = {}
    for cell in cells:
        made.setdefault(cell.code or "code that left no mark", {}).setdefault(cell.label, {})[cell.seed] = None
    if len(made) < 2:
        return ""
    parts = [f"{code} ran {', '.join(_with_seeds(*one) for one in labels.items())}" for code, labels in made.items()]
    return (
        f"These runs are of different code: {'; '.join(parts)}. What differs between them may come from that; a new "
        "folder would run all with one."
    )


def _with_seeds(label: str, seeds: dict[int, None]) -> str:
    return f"{label} (seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))})"
