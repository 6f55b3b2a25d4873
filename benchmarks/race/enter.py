"""A contestant's process: `python -m race.enter WORK NAME FOLDER [our-batches]`."""

import json
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from race.contestants import OUR_BATCHES, contestant
from race.turns import Turn


def main() -> None:
    """Trains until the organiser has heard enough."""
    work, name, folder, *more = sys.argv[1:]
    turn = Turn()
    entry = contestant(work, name)
    if more == [OUR_BATCHES]:
        entry = replace(entry, same_batches=True)
    facts = {**json.loads((Path(folder) / "work.json").read_text()), "folder": folder}
    import_module(f"race.{entry.module}").run(facts, entry, turn)


if __name__ == "__main__":
    main()
