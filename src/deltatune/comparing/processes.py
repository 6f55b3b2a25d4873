"""Running cells in processes of their own, one after the other, so that time and memory are each one's own.

A cell is data in its folder: what stands there says whether it is finished, and any scheduler could run it.
"""

import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

from deltatune.comparing.cell import FAILED, LOG, RESULT, prepare_folder
from deltatune.comparing.experiment import Cell
from deltatune.comparing.results import CellResult, FailedCell
from deltatune.errors import UserError
from deltatune.files import read_json, write_json
from deltatune.training.events import Event, parse_event


def finished(folder: Path) -> CellResult | None:
    """The result that stands in a cell's folder; None where the cell has to run (again)."""
    if not (folder / RESULT).is_file():
        return None
    try:
        return CellResult.model_validate(read_json(folder / RESULT))
    except (UserError, ValueError):  # damaged, or from an older version: the cell runs again
        return None


def run_process(cell: Cell, folder: Path) -> Generator[Event, None, None]:
    """Runs a cell in a new process, passing on its events; it ends with the process. See `outcome` for what came out.

    When the caller stops listening (Ctrl-C among others) the process is ended, too.
    """
    prepare_folder(cell, folder)
    with (
        (folder / LOG).open("wb") as log,
        # A session of its own: Ctrl-C reaches this process alone, which then ends the other in order.
        subprocess.Popen(
            [sys.executable, "-m", "deltatune.comparing.cell", str(folder)],
            stdout=subprocess.PIPE,
            stderr=log,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.endswith("\n") and line.startswith('{"event"'):
                    yield parse_event(line)
            process.wait()
        except BaseException:  # Ctrl-C, or nobody listens any more
            process.terminate()
            raise
    if not any((folder / name).is_file() for name in (RESULT, FAILED)):
        write_json(folder / FAILED, _died(process.returncode, folder))


def outcome(cell: Cell, folder: Path) -> CellResult | FailedCell:
    """What a cell that ran left behind: its result, or why there is none."""
    if result := finished(folder):
        return result
    why = read_json(folder / FAILED) if (folder / FAILED).is_file() else {"reason": "it has not run", "hint": ""}
    choice = cell.method
    return FailedCell(label=choice.label, method=choice.method, options=choice.options, seed=cell.seed, **why)


def _died(code: int, folder: Path) -> dict[str, str]:
    if code == -signal.SIGKILL:
        return {"reason": "the process was killed", "hint": "most likely memory ran out: lower training.batch_tokens"}
    if code < 0:
        return {"reason": f"the process died of {signal.Signals(-code).name}", "hint": f"see {folder / LOG}"}
    lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return {"reason": lines[-1] if lines else f"the process ended with code {code}", "hint": f"see {folder / LOG}"}
