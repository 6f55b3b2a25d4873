"""A contestant's process: `python -m race.enter WORK NAME FOLDER`."""

import json
import sys
from importlib import import_module
from pathlib import Path

from race.contestants import contestant
from race.turns import Turn


def main() -> None:
    """Trains until the organiser has heard enough."""
    work, name, folder = sys.argv[1:]
    turn = Turn()
    entry = contestant(work, name)
    facts = {**json.loads((Path(folder) / "work.json").read_text()), "folder": folder}
    import_module(f"race.{entry.module}").run(facts, entry, turn)


if __name__ == "__main__":
    main()
