"""Under which a measurement was made: commit, versions, machine."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
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


def machine_name(machine: Mapping[str, Any]) -> str:
    """What tells machines apart on a page: their processor, and how it multiplies bf16."""
    words = re.sub(r"\((R|TM|C)\)|@.*|\b(Processor|CPU)\b", " ", machine["processor"]).split()
    ways = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512", "bf16": "bf16"}
    how = next((way for feature, way in ways.items() if feature in machine["bf16"]), "no bf16")
    return f"{' '.join(words)}, {how}"


def machine_folder(machine: Mapping[str, Any]) -> Path:
    """Where the results of a machine like this one belong."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", machine_name(machine).lower()).strip("-")


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
