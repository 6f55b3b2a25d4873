"""How long plans take: every method on a base whose configuration alone is there, in seconds of one processor core.

python benchmarks/plan_speed.py [--bases meta-llama/Llama-2-70b-hf google-bert/bert-base-uncased] [--repeat 3]

Each base has a process of its own with one thread. Importing is told apart; of several plans of all methods the first
and the quickest are printed, with the process' peak memory.
"""

import argparse
import json
import os
import subprocess
import sys

_PLAN = """
import json, sys, time
import deltatune.planning.plan as planning
from deltatune.training.memory import peak
imported, found = time.process_time(), []
for _ in range(int(sys.argv[2])):
    began = time.process_time()
    plans = planning.plan(sys.argv[1], machine="a100-40")
    found.append(time.process_time() - began)
made = sum(isinstance(one, planning.Plan) for one in plans)
print(json.dumps({"imported": imported, "seconds": found, "methods": made, "peak": peak()}))
"""


def measure(base: str, repeat: int = 1) -> dict:
    """Processor seconds of importing and of each plan of every method, how many methods fit, and peak bytes."""
    done = subprocess.run(
        [sys.executable, "-c", _PLAN, base, str(repeat)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measures what the command line asks for and prints a line for each base."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--bases", nargs="*", default=["meta-llama/Llama-2-70b-hf", "google-bert/bert-base-uncased", "minilm"]
    )
    options.add_argument("--repeat", type=int, default=3)
    given = options.parse_args()
    for base in given.bases:
        found = measure(base, given.repeat)
        first, best = found["seconds"][0], min(found["seconds"])
        print(
            f"{base:32} {found['methods']} methods: first {first:.1f} s, quickest {best:.1f} s, imports "
            f"{found['imported']:.1f} s, peak {found['peak'] / 2**20:.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
