"""The process around one cell: one at a time in its folder, with its failure written down.

`python -m deltatune.comparing.worker FOLDER [--force]` runs one alone, a cell or a trial as its spec.json says.
"""

import sys
import traceback
from pathlib import Path

from deltatune.comparing.cell import FAILED, LOG, RESULT, SPEC, run_cell
from deltatune.comparing.experiment import Cell, TrialCell
from deltatune.comparing.locks import running
from deltatune.comparing.results import read_result
from deltatune.comparing.trial import run_trial
from deltatune.errors import UserError
from deltatune.files import read_json, write_json
from deltatune.training.events import EventFile, Listener


def attempt(folder: Path, listen: Listener, *, force: bool = False, forked: bool = False) -> int:
    """Runs what `folder/spec.json` says; a failure is written to failed.json. Returns an exit code."""
    try:
        spec = read_json(folder / SPEC)
        if "trial" in spec:
            run_trial(TrialCell.model_validate(spec), folder, listen)
        else:
            run_cell(Cell.model_validate(spec), folder, listen, force=force, forked=forked)
    except UserError as error:
        write_json(folder / FAILED, {"reason": error.message, "hint": error.hint})
        return 1
    except Exception as error:
        traceback.print_exc()
        hint = f"this is a fault of ours; see {folder / LOG}"
        write_json(folder / FAILED, {"reason": f"{type(error).__name__}: {error}", "hint": hint})
        return 1
    return 0


def main(folder: Path, *, force: bool = False) -> int:
    """The same, telling its events on stdout.

    Where another process still runs the same, its end is waited for, and what it finished is not run again.
    """
    with running(folder), EventFile(Path("/dev/stdout")) as tell:
        if read_result(folder / RESULT):
            return 0
        for name in (RESULT, FAILED):
            (folder / name).unlink(missing_ok=True)
        return attempt(folder, tell, force=force, forked=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), force="--force" in sys.argv[2:]))
