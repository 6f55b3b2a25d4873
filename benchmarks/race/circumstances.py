"""Under which a measurement was made: commit, versions, machine."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets")


def circumstances(packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """Everything that belongs beside a figure, as data."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "command": _command(sys.argv),
        "commit": _git("rev-parse", "HEAD") + ("+" if _git("status", "--porcelain", "src", "benchmarks/*.py") else ""),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "machine": {
            "processor": _field("/proc/cpuinfo", "model name") or platform.processor(),
            "threads": torch.get_num_threads(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
            "bf16": sorted(
                name for name, has in torch.cpu.get_capabilities().items() if "bf16" in name and has is True
            ),
            "load": os.getloadavg()[0],
            "libc": " ".join(platform.libc_ver()),
        },
    }


def _command(words: list[str]) -> str:
    """As it was called, but for where the results went."""
    options = words[1:]
    if "--out" in options:
        place = options.index("--out")
        options = options[:place] + options[place + 2 :]
    return " ".join(["python", str(Path(words[0]).resolve().relative_to(ROOT)), *options])


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def _field(path: str, name: str) -> str:
    if not Path(path).exists():
        return ""
    lines = Path(path).read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
