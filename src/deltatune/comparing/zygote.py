"""A process that has imported everything and forks one process for each cell, so that the imports are paid for once.

`python -m deltatune.comparing.zygote RUN [--force]` waits on stdin for names of folders in RUN, such as cells/CELL,
runs each in a process of its own, and passes on its events on stdout. When that process has ended it says so:
{"ended": CODE}, the exit code, or the negative number of the signal that ended it.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from deltatune.comparing.cell import LOG
from deltatune.comparing.worker import main


def serve(run: Path, force: bool = False) -> None:
    """Runs the cells and trials that are named on stdin, one line each, until it is closed."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run(run / line.strip(), force)
        _, status = os.waitpid(child, 0)
        # A line of its own, whatever the cell left unfinished.
        print(f"\n{json.dumps({'ended': os.waitstatus_to_exitcode(status)})}", flush=True)


def _run(folder: Path, force: bool) -> NoReturn:
    """Runs the cell in this process and ends it, whatever happens."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
        code = main(folder, force=force)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    try:
        serve(Path(sys.argv[1]), force="--force" in sys.argv[2:])
    except BrokenPipeError:  # who started it was killed, and a flush at the end would fail again
        os._exit(1)
