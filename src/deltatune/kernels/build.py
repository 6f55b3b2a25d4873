"""The loops of the C files here as a library: compiled once on each machine by its own compiler, kept in the cache."""

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

_SOURCES = sorted(Path(__file__).parent.glob("*.[ch]"))
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")


@cache
def library(bits: int) -> ctypes.CDLL | str:
    """The functions for numbers of 16 or 32 bits; or why there are none.

    Needs GCC or Clang with OpenMP; $CC names another than `cc`. PyTorch's OpenMP is loaded already, so its threads are
    the ones that are used.
    """
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        return "there is no C compiler here: install gcc"
    told = (*_FLAGS, f"-DBITS={bits}")
    made_of = [file.read_bytes() for file in _SOURCES], told, compiler, _processor()
    digest = hashlib.sha256(repr(made_of).encode()).hexdigest()
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
        sources = [str(source) for source in _SOURCES if source.suffix == ".c"]
        command = [compiler, *flags, "-o", str(made), *sources, "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True)
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
