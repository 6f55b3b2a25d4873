"""Resident memory of this process: now, and at its highest; and giving back what is free."""

import ctypes
import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def resident() -> int:
    """Bytes resident now; 0 where the system does not say."""
    return _field("VmRSS")


def peak() -> int:
    """The most bytes that were ever resident in this process.

    Linux's own high-water mark is read: `getrusage` also counts what the process was before it ran this program.
    """
    if _STATUS.exists():
        return _field("VmHWM")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def give_back() -> None:
    """Hands free memory back to the system, where the C library can (glibc); it keeps most of it for itself else."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _field(name: str) -> int:
    if not _STATUS.exists():
        return 0
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024
