"""Runs a work's contestants in turn and checks that they do equal work."""

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from race.contestants import OUR_BATCHES, WORKS, Contestant
from race.turns import Racer


def race(work: str, facts: dict[str, Any], folder: Path, starts: int, say: Callable[[str], None]) -> dict[str, Any]:
    """All contestants of a work: seconds to the first step, steps in turn, peaks, quality; and the checks."""
    entries = WORKS[work]
    found: dict[str, dict[str, Any]] = {
        entry.name: {**entry.facts(), "first_step": [], "steps": []} for entry in entries
    }
    for number in range(starts):
        for entry in entries:
            if entry.kind != "probe":
                with _start(work, entry, folder) as racer:
                    racer.hear()
                    found[entry.name]["first_step"].append(racer.since_command())
        say(f"{work}: start {number + 1} of {starts}")
    with ExitStack() as stack:
        racers: dict[str, Racer] = {}
        for entry in entries:  # one after the other: each is blocked after its first step while the next one loads
            racers[entry.name] = stack.enter_context(_start(work, entry, folder))
            found[entry.name]["steps"].append(racers[entry.name].hear())
            found[entry.name]["first_step"].append(racers[entry.name].since_command())
            say(f"{work}: {entry.name} is ready")
        for step in range(1, facts["steps"]):
            first = step % len(entries)  # each takes a turn at being first: what ran before leaves its traces in caches
            for entry in [*entries, *entries][first : first + len(entries)]:
                found[entry.name]["steps"].append(racers[entry.name].turn())
            say(f"{work}: step {step + 1} of {facts['steps']}")
        for entry in entries:
            found[entry.name]["peak_bytes"] = racers[entry.name].peak()
            found[entry.name] |= racers[entry.name].turn()
            racers[entry.name].end()
    for entry in entries:
        if not entry.same_batches:
            say(f"{work}: {entry.name} once more, with our batches and alone")
            found[entry.name]["alike"] = _alike(work, entry, folder)
    return {"contestants": found, "checks": checks(found, entries)}


def _start(work: str, entry: Contestant, folder: Path, *more: str) -> Racer:
    command = ["-m", "race.enter", work, entry.name, str(folder), *more]
    return Racer(command, entry.environment, folder / f"{entry.name}.log")


def _alike(work: str, entry: Contestant, folder: Path) -> dict[str, Any]:
    """What a contestant with batches of its own learns from ours: after so few steps their order decides by itself."""
    steps = []
    with _start(work, entry, folder, OUR_BATCHES) as racer:
        said = racer.hear()
        while "finished" not in said:
            steps.append(said)
            said = racer.turn()
    return {"steps": steps, "quality": said["quality"]}


def checks(found: dict[str, dict[str, Any]], entries: Sequence[Contestant]) -> list[dict[str, Any]]:
    """Whether all did equal work: what was compared, by how much they are apart, how much they may be.

    With the same batches: those that raced with others trained once more with these.
    """
    entries = [entry for entry in entries if entry.kind != "probe"]
    alike = {entry.name: found[entry.name].get("alike", found[entry.name]) for entry in entries}
    batches = [[(step["examples"], step["tokens"]) for step in one["steps"]] for one in alike.values()]
    rows = [
        ("as many examples", [sum(step["examples"] for step in found[entry.name]["steps"]) for entry in entries], 0.02)
    ]
    for kind in dict.fromkeys(entry.kind for entry in entries):
        names = [entry.name for entry in entries if entry.kind == kind]
        after = [alike[name]["quality"]["loss"] for name in names]
        rows += [
            (f"{kind}: as many parameters train", [found[name]["trainable"] for name in names], 0.0),
            (f"{kind}: mean loss, same batches", [_mean_loss(alike[name]) for name in names], 0.05),
            (f"{kind}: mean loss, as raced", [_mean_loss(found[name]) for name in names], 0.15),
            (f"{kind}: loss on the validation examples after training, same batches", after, 0.08),
        ]
    same = {"check": "the same examples and tokens in every step", "holds": all(b == batches[0] for b in batches)}
    return [same] + [
        {"check": what, "values": values, "apart": _apart(values), "allowed": most, "holds": _apart(values) <= most}
        for what, values, most in rows
    ]


def _mean_loss(ran: dict[str, Any]) -> float:
    return statistics.fmean(step["loss"] for step in ran["steps"])


def _apart(values: Sequence[float]) -> float:
    return (max(values) - min(values)) / max(map(abs, values)) if any(values) else 0.0
