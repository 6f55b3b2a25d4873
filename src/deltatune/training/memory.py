"""Resident memory of this process: now, and at its highest; and what becomes of memory that it frees."""

import ctypes
import resource
import sys
from mmap import PAGESIZE
from pathlib import Path

_STATUS = Path("/proc/self/status")
_TRIM, _MAP = -1, -3
"""glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD (mallopt(3))."""
_HUGE = 14
"""Linux's MADV_HUGEPAGE (madvise(2))."""
MOST_KEPT = 2**31 - 2**27
"""Bytes that glibc can be told to keep: an int, less what may be free already."""


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
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


def keep_freed(most: int) -> bool:
    """Lets up to so many bytes that are freed from now on stay with this process, in large pages; whether it can.

    A step then finds memory where the one before left it. Otherwise glibc gives most of it back, and the system clears
    it anew, page by page. So what is resident stays at the most that it was, and large pages round it up.
    """
    library = _glibc()
    if library is None or most <= 0:
        return False
    library.malloc_trim(0)
    library.mallopt(_MAP, 2**31 - 1)  # it comes from the heap, however large it is,
    library.mallopt(_TRIM, 2**31 - 1)  # which does not shrink
    library.malloc.restype = ctypes.c_void_p
    room = library.malloc(ctypes.c_size_t(most))
    if room is None:
        return False
    begin, end = -(-room // PAGESIZE) * PAGESIZE, (room + most) // PAGESIZE * PAGESIZE
    library.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(max(0, end - begin)), _HUGE)
    library.free(ctypes.c_void_p(room))
    return True


def keeps_freed() -> bool:
    """Whether `keep_freed` can do anything here."""
    return _glibc() is not None


def _glibc() -> ctypes.CDLL | None:
    """The C library, where that is glibc."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "malloc_trim") else None


def _field(name: str) -> int:
    if not _STATUS.exists():
        return 0
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024
