"""Several processes on one run folder: who runs which cell. A lock ends with the process that holds it.

RUN/.locks/cells/CELL.claimed   held by the command that has the cell run
RUN/.locks/cells/CELL.running   held by the process that runs it, which may outlive that command for a moment
RUN/.locks/report               held while the report is written
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from deltatune.files import disk_errors


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether this process may have the cell of that folder run, which no other one does within the block."""
    lock = _lock(folder.parents[1], f"{folder.parent.name}/{folder.name}.claimed")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def running(folder: Path) -> FileLock:
    """Held by the one process that runs the cell of that folder; waits until no other does."""
    return _lock(folder.parents[1], f"{folder.parent.name}/{folder.name}.running")


def is_running(folder: Path) -> bool:
    """Whether a process runs the cell of that folder now."""
    lock = FileLock(folder.parents[1] / ".locks" / folder.parent.name / f"{folder.name}.running")
    if not Path(lock.lock_file).is_file():
        return False
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    lock.release()
    return False


def writing(run: Path) -> FileLock:
    """Held while the results and the report of a run are written."""
    return _lock(run, "report")


def _lock(run: Path, name: str) -> FileLock:
    path = run / ".locks" / name
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)
