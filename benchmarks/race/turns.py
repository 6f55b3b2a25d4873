"""Taking turns: each contestant is a process of its own, and only the one whose turn it is works.

A process of its own gives each its own allocator, threads, peak of memory and time from command to first step; turns
after every step give all of them the same machine, whatever else it does. The one that waits is blocked in a read.
Contestants talk in lines of JSON on what was their stdout; whatever their libraries print goes to stderr.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "src"


class Turn:
    """A contestant's side: says what a step took, and waits until it may take the next one."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._began = time.perf_counter()

    def done(self, *, examples: int, tokens: int, loss: float) -> None:
        """Ends a step that began when the turn was given: its examples, real tokens and mean loss. Waits."""
        self.say(seconds=time.perf_counter() - self._began, examples=examples, tokens=tokens, loss=loss)

    def say(self, **facts: Any) -> None:
        """Tells the organiser something, and waits for the next turn."""
        self._out.write(json.dumps(facts) + "\n")
        self._out.flush()
        if not sys.stdin.readline():  # the organiser has heard enough
            os._exit(0)
        self._began = time.perf_counter()


class Racer:
    """The organiser's side of one contestant, already at its first turn. Use it as a context manager."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        path = os.pathsep.join([str(SOURCE), str(HERE.parent)])
        self._began = time.perf_counter()
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", **environment},
            )

    def __enter__(self) -> "Racer":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def hear(self) -> dict[str, Any]:
        """What it says next; raises RuntimeError with the end of its log where it is gone."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._log.stem} ended:\n{self._log.read_text()[-3000:]}")
        said: dict[str, Any] = json.loads(line)
        return said

    def turn(self) -> dict[str, Any]:
        """Gives it a turn and waits for what it then says."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self.hear()

    def since_command(self) -> float:
        """Seconds since the process was started."""
        return time.perf_counter() - self._began

    def peak(self) -> int:
        """The most bytes that were ever resident in it."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
