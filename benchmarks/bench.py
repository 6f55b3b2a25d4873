"""The race against the peers: training throughput, peak memory, seconds to the first step, and what was learnt.

python benchmarks/bench.py [--only WORK …] [--quick] [--out FOLDER]

Every contestant trains the same examples of the same base, in a process of its own; they take turns step by step, so
that whatever else the machine does slows all of them alike. Who they are and how they are set stands in
`race/contestants.py`, what they train in `race/works.py`. That it is equal work is checked. Each work's results are a
JSON file, from which `python benchmarks/speed_page.py` writes docs/speed.md and the table of the README.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from race.circumstances import circumstances, machine_folder
from race.organiser import race
from race.works import WORKS, write


def main() -> None:
    """Races; ends with 1 where a check does not hold."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", choices=WORKS, default=list(WORKS))
    options.add_argument("--quick", action="store_true", help="a few steps each, to see that everything runs")
    options.add_argument("--out", type=Path, help="instead of the machine's own folder in benchmarks/results")
    given = options.parse_args()
    failed = False
    for name in given.only:
        head = {"work": name, "what": WORKS[name].what, "quick": given.quick, "warm": WORKS[name].warm}
        with tempfile.TemporaryDirectory(prefix="race-") as place:
            around = circumstances()
            facts = write(name, Path(place), given.quick)
            starts = 0 if given.quick else WORKS[name].starts
            found = race(name, facts, Path(place), starts, lambda line: print(line, file=sys.stderr, flush=True))
        folder = given.out or machine_folder(around["machine"])
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.json"
        path.write_text(json.dumps({**head, **around, **facts | {"batches": None}, **found}, indent=1) + "\n")
        print(path)
        for check in found["checks"]:
            failed |= not check["holds"]
            print(f"{'holds' if check['holds'] else 'FAILS'}: {check['check']} {check.get('values', '')}")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
