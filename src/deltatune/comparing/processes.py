"""Running cells in processes of their own, one after the other, so that time and memory are each one's own.

A cell is data in its folder: what stands there says whether it is finished, and any scheduler could run it.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from deltatune.comparing.cell import FAILED, LOG, RESULT, SPEC
from deltatune.comparing.experiment import Cell
from deltatune.comparing.results import CellResult, FailedCell, Trained, read_result
from deltatune.files import read_json, write_json
from deltatune.training.events import Event, parse_event


class CellProcesses:
    """Runs cells and trials of a run, each in a process forked for it. Leaving the `with` block ends what still runs.

    `force`: even where a plan exceeds this machine's memory. The processes are forked from one that has imported
    everything (see zygote.py); it starts with the first cell.
    """

    def __init__(self, folder: Path, *, force: bool = False) -> None:
        self.folder = folder
        self._words = ["--force"] if force else []
        self._zygote: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def run(self, cell: Cell) -> Iterator[Event]:
        """Runs a cell and passes on its events; it ends with the process. See `outcome` for what came out."""
        folder = self.folder / cell.place
        write_json(folder / SPEC, cell.model_dump(mode="json"))
        (folder / FAILED).unlink(missing_ok=True)
        zygote = self._running()
        assert zygote.stdin is not None
        assert zygote.stdout is not None
        zygote.stdin.write(cell.place + "\n")
        zygote.stdin.flush()
        code = None
        for line in zygote.stdout:
            if line.startswith('{"ended"'):
                code = json.loads(line)["ended"]
                break
            if line.endswith("\n") and line.startswith('{"event"'):
                yield parse_event(line)
        if code is None:  # the zygote itself has died, and the cell with it
            code = zygote.wait()
            self._zygote = None
        if not any((folder / name).is_file() for name in (RESULT, FAILED)):
            write_json(folder / FAILED, _died(code, folder))

    def _running(self) -> subprocess.Popen[str]:
        if self._zygote is None or self._zygote.poll() is not None:  # none yet, or it was killed between two cells
            self._zygote = subprocess.Popen(
                [sys.executable, "-m", "deltatune.comparing.zygote", str(self.folder), *self._words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                # A session of its own: Ctrl-C reaches this process alone, which then ends the others in order.
                start_new_session=True,
            )
        return self._zygote

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._zygote is not None:
            os.killpg(self._zygote.pid, signal.SIGTERM)
            self._zygote.communicate()  # to the end of its output: then no process holds it any more


def outcome(cell: Cell, folder: Path) -> CellResult | Trained | FailedCell:
    """What a cell or trial that ran left behind: its result, or why there is none."""
    if result := read_result(folder / RESULT):
        return result
    why = read_json(folder / FAILED) if (folder / FAILED).is_file() else {"reason": "it has not run", "hint": ""}
    choice = cell.method
    return FailedCell(label=choice.label, method=choice.method, options=choice.options, seed=cell.seed, **why)


def _died(code: int, folder: Path) -> dict[str, str]:
    if code == -signal.SIGKILL:
        return {"reason": "the process was killed", "hint": "most likely memory ran out: lower training.batch_tokens"}
    if code < 0:
        return {"reason": f"the process died of {signal.Signals(-code).name}", "hint": f"see {folder / LOG}"}
    log = folder / LOG
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return {"reason": lines[-1] if lines else f"the process ended with code {code}", "hint": f"see {log}"}
