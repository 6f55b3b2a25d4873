"""What code a result came from, so that results of different code are not taken for one comparison."""

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

import deltatune

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
