"""Runs a work's contestants in turn and checks that they do equal work."""

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from race.contestants import WORKS, Contestant
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
    return {"contestants": found, "checks": checks(found, entries)}


def _start(work: str, entry: Contestant, folder: Path) -> Racer:
    return Racer(["-m", "race.enter", work, entry.name, str(folder)], entry.environment, folder / f"{entry.name}.log")


def checks(found: dict[str, dict[str, Any]], entries: Sequence[Contestant]) -> list[dict[str, Any]]:
    """Whether all did equal work: what was compared, by how much they are apart, how much they may be."""
    entries = [entry for entry in entries if entry.kind != "probe"]
    batches = [
        [(step["examples"], step["tokens"]) for step in found[entry.name]["steps"]]
        for entry in entries
        if entry.same_batches
    ]
    rows = [
        ("as many examples", [sum(step["examples"] for step in found[entry.name]["steps"]) for entry in entries], 0.02)
    ]
    for kind in dict.fromkeys(entry.kind for entry in entries):
        alike = [entry for entry in entries if entry.kind == kind]
        losses = {entry.name: statistics.fmean(one["loss"] for one in found[entry.name]["steps"]) for entry in alike}
        after = [found[entry.name]["quality"]["loss"] for entry in alike]
        rows += [
            (f"{kind}: as many parameters train", [found[entry.name]["trainable"] for entry in alike], 0.0),
            (f"{kind}: mean loss, same batches", [losses[entry.name] for entry in alike if entry.same_batches], 0.05),
            (f"{kind}: mean loss, all", [*losses.values()], 0.15),
            (f"{kind}: loss on the validation examples after training", after, 0.08),
        ]
    same = {"check": "the same examples and tokens in every step", "holds": all(b == batches[0] for b in batches)}
    return [same] + [
        {"check": what, "values": values, "apart": _apart(values), "allowed": most, "holds": _apart(values) <= most}
        for what, values, most in rows
    ]


def _apart(values: Sequence[float]) -> float:
    return (max(values) - min(values)) / max(map(abs, values)) if any(values) else 0.0
