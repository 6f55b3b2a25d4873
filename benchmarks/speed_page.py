"""Writes docs/speed.md and the README's table of speed from the measurements in benchmarks/results.

python benchmarks/speed_page.py
"""

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from race.circumstances import RESULTS, machine_name

ROOT = Path(__file__).resolve().parent.parent
WORKS = ("minilm", "smollm2", "smollm2-8x128", "smollm2-dora", "smollm2-qlora")
BEGIN, END = "<!-- from benchmarks/results: make speed -->", "<!-- end -->"
QUICK = "**A quick run, which only shows that everything runs: these figures mean nothing.**"
Result = Mapping[str, Any]
Machines = Mapping[str, Mapping[str, Result]]
"""The results of each machine, by name."""


@dataclass(frozen=True)
class Goal:
    """A figure to reach: `of` against `to` in a work."""

    work: str
    of: str
    to: str
    measure: str
    """faster: how many times; cost: its time as a multiple; reached: the other's time as a share; memory; start."""
    aim: float

    @property
    def more(self) -> bool:
        """Whether larger is better."""
        return self.measure in ("faster", "reached")


GOALS = (
    Goal("minilm", "deltatune", "trainer", "faster", 18),
    Goal("minilm", "deltatune", "peft", "faster", 1.8),
    Goal("minilm", "deltatune", "peft, allocator", "faster", 1.8),
    Goal("smollm2", "deltatune", "trl", "faster", 4),
    Goal("smollm2", "deltatune", "peft", "faster", 2.2),
    Goal("smollm2", "deltatune", "peft, allocator", "faster", 1.6),
    Goal("smollm2-8x128", "deltatune", "probe", "reached", 0.62),
    Goal("smollm2-dora", "deltatune dora", "deltatune", "cost", 1.2),
    Goal("smollm2-qlora", "deltatune qlora", "deltatune", "cost", 1.12),
    Goal("smollm2-dora", "deltatune dora", "peft dora", "faster", 1.9),
    Goal("smollm2-dora", "deltatune dora", "peft dora, allocator", "faster", 1.9),
    Goal("smollm2-qlora", "deltatune qlora", "peft qlora", "faster", 1.5),
    Goal("smollm2-qlora", "deltatune qlora", "peft qlora, allocator", "faster", 1.5),
    Goal("smollm2", "deltatune", "peft", "memory", 0.55),
    Goal("minilm", "deltatune", "trainer", "start", 0.8),
)
MEASURES = {
    "faster": "times as fast",
    "cost": "time of a step, as a multiple",
    "reached": "of the limit",
    "memory": "peak memory, as a multiple",
    "start": "seconds to the first step, as a multiple",
}


def read(folder: Path = RESULTS) -> Machines:
    """The measurements that are there."""
    found: dict[str, dict[str, Result]] = {}
    for path in sorted(folder.glob("*/*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(machine_name(result["machine"]), {})[path.stem] = result
    return found


def per_token(result: Result, name: str) -> list[float]:
    """Seconds a real token of each timed step of a contestant."""
    steps = result["contestants"][name]["steps"]
    return [step["seconds"] / step["tokens"] for step in steps[max(1, round(result["warm"] * len(steps))) :]]


def ratios(result: Result, of: str, to: str) -> list[float]:
    """The time of one as a multiple of another's, round by round."""
    return [a / b for a, b in zip(per_token(result, of), per_token(result, to), strict=True)]


def value(result: Result, goal: Goal) -> float:
    """What was reached."""
    of, to = (result["contestants"][name] for name in (goal.of, goal.to))
    if goal.measure == "memory":
        return float(of["peak_bytes"] / to["peak_bytes"])
    if goal.measure == "start":
        return statistics.median(a / b for a, b in zip(of["first_step"], to["first_step"], strict=True))
    pair = (goal.of, goal.to) if goal.measure == "cost" else (goal.to, goal.of)
    return statistics.median(ratios(result, *pair))


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def goals(machines: Machines, *, aims: bool) -> str:
    """The goals with what was reached on each machine, those that were missed like those that were met."""
    rows = []
    for goal in GOALS:
        there = [results[goal.work] for results in machines.values() if goal.work in results]
        if not there:
            continue
        what = [goal.work, _what(there[0], goal.of), _what(there[0], goal.to), MEASURES[goal.measure]]
        aim = [f"{'≥' if goal.more else '≤'} {goal.aim:g}"] if aims else []
        rows.append([*what, *aim, *(_reached(results, goal, aims) for results in machines.values())])
    return table(("Work", "Ours", "Against", "What", *(("Goal",) if aims else ()), *machines), rows)


def _reached(results: Mapping[str, Result], goal: Goal, aims: bool) -> str:
    if goal.work not in results:
        return ""
    reached = value(results[goal.work], goal)
    met = reached >= goal.aim if goal.more else reached <= goal.aim
    return f"{reached:.2f}" + (f" ({'met' if met else '**missed**'})" if aims else "")


def _what(result: Result, name: str) -> str:
    what: str = result["contestants"][name]["what"]
    return "LoRA" if name == "deltatune" else what


def work_section(result: Result) -> str:
    """One work: circumstances, every contestant, the checks."""
    rows = []
    for name, one in result["contestants"].items():
        steps = one["steps"][max(1, round(result["warm"] * len(one["steps"]))) :]
        seconds = sum(step["seconds"] for step in steps)
        compared = ratios(result, name, "deltatune")
        low, middle, high = statistics.quantiles(compared, n=4) if len(compared) > 1 else compared * 3
        first = statistics.median(one["first_step"]) if one["first_step"] else None
        rows.append(
            (
                name,
                one["what"],
                f"{1000 * statistics.median(step['seconds'] for step in steps):.0f}",
                f"{sum(step['examples'] for step in steps) / seconds:.1f}",
                f"{sum(step['tokens'] for step in steps) / seconds:.0f}",
                f"{middle:.2f} ({low:.2f} to {high:.2f})",
                f"{one['peak_bytes'] / 1e6:,.0f}",
                "" if first is None else f"{first:.1f}",
                _learnt(one["quality"])
                + (f"; with our batches {_learnt(one['alike']['quality'])}" if "alike" in one else ""),
            )
        )
    headings = (
        *("Contestant", "What", "ms a step", "Examples/s", "Tokens/s", "Time a token, of ours"),
        *("Peak, MB", "First step, s", "Validation after training"),
    )
    checks = "\n".join(f"- {'holds' if one['holds'] else '**fails**'}: {_check(one)}" for one in result["checks"])
    settings = "\n".join(
        f"- {name}: `{json.dumps({**one['settings'], **one['environment']})}`"
        for name, one in result["contestants"].items()
    )
    return (
        f"### {result['what']}\n\n{circumstances(result)}\n\n{table(headings, rows)}\n\n"
        f"Equal work, checked:\n\n{checks}\n\nSettings:\n\n{settings}\n"
    )


def _learnt(quality: Result) -> str:
    return ", ".join(f"{key} {figure:.3f}" for key, figure in quality.items())


def _check(one: Result) -> str:
    if "apart" not in one:
        return str(one["check"])
    return f"{one['check']}: {one['apart']:.1%} apart, {one['allowed']:.0%} allowed"


def circumstances(result: Result) -> str:
    """One paragraph about how it was measured."""
    machine, versions = result["machine"], result["versions"]
    quick = f"{QUICK} " if result["quick"] else ""
    bf16 = ", ".join(machine["bf16"]) or "no bf16"
    commit = result["commit"][:10] + ("+" if result["commit"].endswith("+") else "")
    return (
        f"{quick}`{result['command']}` at commit {commit}, {result['date']}, on {machine['processor']} ({bf16}), "
        f"{machine['cores']} cores, {machine['threads']} threads, {machine['memory_gb']} GB, "
        f"load {machine['load']:.1f} at the start; {', '.join(f'{name} {one}' for name, one in versions.items())}."
    )


PREFACE = """# Speed and memory

Written by `make speed` from the JSON files in `benchmarks/results`, a folder for each machine, which `make bench` and
`python benchmarks/growth.py` measure. Each contestant is a process of its own, and they take turns after every step, so
that whatever else the machine does slows all alike. Ratios are medians over the rounds, of seconds a real token, with
quartiles in brackets; rounds of warming up are left out. Peak memory is the most that was resident in the process up to
its last step, imports included. Seconds to the first step are from the command to the end of that step, in fresh
processes that take turns as well.
A commit with a plus had changes that were not in it.
"""

UNITS = {
    "rank": "rank",
    "tokens": "tokens in a batch",
    "length": "tokens of a text, 4,096 in a batch",
    "layers": "adapted blocks, of 16, from the top",
    "adapters": "adapters side by side, one active",
}


def growth_section(result: Result) -> str:
    """Every sweep with its exponents."""
    parts = [f"### Growth\n\n{circumstances(result)}\n\n{growth_summary(result)}"]
    for name, one in result["sweeps"].items():
        rows = [
            (row["size"], f"{1000 * row['seconds']:.0f}", f"{row['bytes'] / 1e6:.0f}", f"{row['operations'] / 1e9:.0f}",
             f"{row['kept'] / 1e6:.0f}")
            for row in one["rows"]
        ]  # fmt: skip
        parts.append(
            table((UNITS[name], "ms a step", "MB above the weights", "GFLOP in theory", "MB kept in theory"), rows)
        )
    return "\n\n".join(parts) + "\n"


def growth_summary(result: Result) -> str:
    """The exponents of all sweeps beside those of theory."""
    rows = []
    for name, one in result["sweeps"].items():
        found = one["exponents"]
        rows.append(
            (
                UNITS[name],
                *(f"{found[key]:.2f}" for key in ("seconds", "operations", "bytes", "kept")),
                ", ".join({"seconds": "time", "bytes": "memory"}[key] for key in one["worse"]) or "no",
            )
        )
    return table(("Against", "Time grows by", "in theory", "Memory grows by", "in theory", "Worse than theory"), rows)


def page(machines: Machines) -> str:
    """docs/speed.md."""
    if not machines:
        return f"{PREFACE}\nNothing is measured yet.\n"
    sections = []
    for machine, results in machines.items():
        sections += [f"## On {machine}\n", *(work_section(results[name]) for name in WORKS if name in results)]
        if "growth" in results:
            sections.append(growth_section(results["growth"]))
    return f"{PREFACE}\n## Goals\n\n{goals(machines, aims=True)}\n\n" + "\n".join(sections)


def readme_part(machines: Machines) -> str:
    """What stands in the README between the marks, these included."""
    raced = [results[name] for results in machines.values() for name in WORKS if name in results]
    if not raced:
        return f"{BEGIN}\n{END}"
    quick = f"{QUICK}\n\n" if any(result["quick"] for result in raced) else ""
    return f"{BEGIN}\n{quick}{goals(machines, aims=False)}\n{END}"


def in_readme(readme: str, part: str) -> str:
    """The README with the part between the marks replaced."""
    return re.sub(rf"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: part, readme, flags=re.DOTALL)


def main() -> None:
    """Writes both."""
    results = read()
    (ROOT / "docs" / "speed.md").write_text(page(results), encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(in_readme(readme.read_text(encoding="utf-8"), readme_part(results)), encoding="utf-8")


if __name__ == "__main__":
    main()
