"""The loops of kernels.c as a library: compiled once on each machine, by its own compiler, and kept in the cache."""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from deltatune.packages import cache_root

log = logging.getLogger("deltatune")

_SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")


@cache
def library(bits: int) -> ctypes.CDLL | str:
    """The functions of kernels.c for numbers of 16 or 32 bits; or why there are none.

    Needs GCC or Clang with OpenMP; $CC names another than `cc`. PyTorch's OpenMP is loaded already, so its threads are
    the ones that are used.
    """
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        return "there is no C compiler here: install gcc"
    told = (*_FLAGS, f"-DBITS={bits}")
    digest = hashlib.sha256(repr((_SOURCE.read_bytes(), told, compiler, _processor())).encode()).hexdigest()
    file = cache_root() / "kernels" / f"{digest[:24]}.so"
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if others := _others(file.parent):
            return (
                f"{file.parent} {others}, who could put other code there: set DELTATUNE_CACHE to a folder of your own"
            )
        if not file.exists():
            _compile(compiler, told, file)
        return ctypes.CDLL(str(file))
    except subprocess.CalledProcessError as error:
        log.debug("%s", error.stderr)
        return f"{compiler} could not compile them"
    except OSError as error:
        return f"they could not be kept or loaded: {error.strerror or error}"


def _compile(compiler: str, flags: tuple[str, ...], file: Path) -> None:
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        subprocess.run(
            [compiler, *flags, "-o", str(made), str(_SOURCE), "-lm"], check=True, capture_output=True, text=True
        )
        made.replace(file)


def _others(folder: Path) -> str:
    """What lets other users write to a folder; empty where nothing does."""
    found = folder.stat()
    if found.st_uid not in (os.geteuid(), 0):
        return "belongs to another user"
    return "can be written to by other users" if found.st_mode & 0o022 else ""


def _processor() -> str:
    """What tells processors apart: machines can share a cache, and what was made for one may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return " ".join(os.uname())
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
