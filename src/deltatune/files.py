"""Writing files so that a reader sees all of one or none of it, and a full disk costs nothing that was there."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from deltatune.errors import UserError


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what the disk refuses (full, read-only, no permission) into an error that names the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps what the system said
        raise UserError(
            f"could not write {path}: {getattr(error, 'strerror', None) or error}",
            "free some space or choose another place; what was finished before is still there",
        ) from error


def write_text(path: Path, text: str) -> None:
    """Replaces `path` with `text` in UTF-8, in one step."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces `path` with `content` in one step: written beside it, flushed to the disk, then renamed."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, in one step. Refuses NaN and infinity, which JSON does not have."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file; a missing or damaged one is an error that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"could not read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}", "the file is damaged or was edited by hand") from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `path` to fill, which takes its place when the block ends without an error.

    What stood at `path` is moved aside first and deleted last, so that one of the two is whole at every moment.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    old = temporary.with_suffix(".old")
    try:
        with disk_errors(path):
            yield temporary
            for entry in (*temporary.rglob("*"), temporary):
                entry.chmod(0o755 if entry.is_dir() else 0o644)  # safetensors and mkdtemp let only the owner read
                _flush(entry)
            if path.exists():
                path.rename(old)
            temporary.rename(path)
            _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Asks the system to put a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
