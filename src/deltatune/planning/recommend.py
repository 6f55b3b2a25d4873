"""Which method to take under a budget: filtered by the plan, ranked by evidence, with the reason for each.

Evidence is what runs measured, in the folders that one points at; without any, the selection guide as it is taught,
which is named as such. A trial is evidence of one's own: a few steps of the nearest candidates on the data itself.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal, get_args

from deltatune.data import DialogueData, TextData
from deltatune.errors import UserError, unknown
from deltatune.files import read_json
from deltatune.methods import make, parse
from deltatune.models.base import load
from deltatune.planning.machine import Machine
from deltatune.planning.plan import Plan, plan_run
from deltatune.training.settings import Training
from deltatune.training.tune import tune

Goal = Literal["quality", "speed", "size", "serving"]
GOALS: tuple[Goal, ...] = get_args(Goal)

GUIDE: Mapping[str, tuple[int, str]] = {
    "dora": (1, "better results than LoRA, as taught"),
    "lora": (2, "the baseline, as taught"),
    "dora@nf4": (3, "QLoRA with DoRA: for 7B and more, or little memory, as taught"),
    "lora@nf4": (4, "QLoRA: for 7B and more, or little memory, as taught"),
    "vblora": (5, "for many tasks or the least storage, as taught"),
    "pfeiffer": (6, "bottleneck adapters: for modular multi-task work, as taught"),
    "prompt": (7, "for very large models with cheap state for each task, as taught"),
    "full": (8, "what the others are compared with; the guide does not rank it"),
    "bitfit": (9, "not in the guide"),
    "ia3": (10, "not in the guide"),
    "head": (11, "not in the guide"),
}
"""`method` or `method@storage` → place in the selection guide as it is taught (docs/claims.md), and its words."""


@dataclass(frozen=True)
class Limits:
    """What a choice must keep to; None where it does not matter."""

    memory: int | None = None
    """Bytes at the peak."""
    seconds: float | None = None
    """Of the training steps."""
    adapter: int | None = None
    """Bytes of the file."""


@dataclass(frozen=True)
class Candidate:
    """A method in a storage, with its plan, its evidence, and why it is in or out."""

    method: str
    storage: str
    plan: Plan | None
    quality: float | None
    """What was measured of it; None without evidence."""
    evidence: str
    """Where its rank is from."""
    out: str
    """Why it is out; empty where it is in."""
    pareto: bool = False
    """Whether no other one that is in is better or equal in every respect."""

    @property
    def words(self) -> str:
        """As it is written on a command line."""
        return f"--method {self.method}" + (f" --storage {self.storage}" if self.storage else "")


def recommend(
    base: str,
    data: TextData | DialogueData,
    limits: Limits,
    goal: Goal = "quality",
    *,
    settings: Training | None = None,
    machine: str | Machine = "",
    runs: Iterable[Path] = (),
    trial: float = 0.0,
) -> list[Candidate]:
    """Every candidate, the best first and those that are out last.

    `trial` is how many seconds may be spent on short runs of the best three. Raises `UserError` for a goal that does
    not exist, and a base or a run's folder that is none.
    """
    if goal not in GOALS:
        raise unknown("goal", goal, GOALS)
    settings = settings or Training()
    measured = _evidence(runs, data.name)
    found = [_candidate(words, base, data, settings, limits, machine, measured) for words in GUIDE]
    ranked = _ranked(found, goal)
    if trial:
        chosen = [one for one in ranked if not one.out][:3]
        found = [_tried(one, base, data, settings, trial / len(chosen)) if one in chosen else one for one in ranked]
        ranked = _ranked(found, goal)
    return _marked(ranked)


def _candidate(
    words: str,
    base: str,
    data: TextData | DialogueData,
    settings: Training,
    limits: Limits,
    machine: str | Machine,
    measured: Mapping[str, list[float]],
) -> Candidate:
    name, _, storage = words.partition("@")
    scores = measured.get(words, [])
    quality = fmean(scores) if scores else None
    evidence = (
        f"measured in {len(scores)} run{'s' if len(scores) > 1 else ''}" if scores else f"guide: {GUIDE[words][1]}"
    )
    try:
        method = make(*parse(name))
        plan = plan_run(base, data, method, settings, storage=storage, machine=machine)
    except UserError as error:
        return Candidate(name, storage, None, quality, evidence, error.message)
    over = []
    if not plan.fits or (limits.memory is not None and plan.memory.peak > limits.memory):
        over.append(f"it takes {plan.memory.peak / 1e9:.2f} GB")
    if limits.seconds is not None and (plan.seconds or 0) > limits.seconds:
        over.append(f"it takes {plan.seconds or 0:.0f} s")
    if limits.adapter is not None and plan.adapter_bytes > limits.adapter:
        over.append(f"its file has {plan.adapter_bytes / 1e6:.2f} MB")
    return Candidate(name, storage, plan, quality, evidence, ", ".join(over))


def _ranked(found: Sequence[Candidate], goal: Goal) -> list[Candidate]:
    """Those that are in first; by the goal, then by evidence, measured before taught."""

    def taught(one: Candidate) -> int:
        return GUIDE[f"{one.method}@{one.storage}" if one.storage else one.method][0]

    def key(one: Candidate) -> tuple[float, ...]:
        evidence = (one.quality is None, -(one.quality or 0.0), taught(one))
        if one.plan is None:
            return (True, True, *evidence)
        size, took = one.plan.adapter_bytes, one.plan.seconds or 0.0
        whole = bool(getattr(make(one.method), "unmergeable", ""))  # merged, it adds nothing where it is served
        by_goal = {"quality": (), "speed": (took,), "size": (size,), "serving": (whole, size)}
        return (bool(one.out), False, *by_goal[goal], *evidence)

    return sorted(found, key=key)


def _marked(ranked: Sequence[Candidate]) -> list[Candidate]:
    """With the Pareto front of those that are in: memory, time, file, and the place by evidence."""
    inside = [one for one in ranked if not one.out and one.plan is not None]
    by_quality = _ranked(inside, "quality")

    def costs(one: Candidate) -> tuple[float, ...]:
        assert one.plan is not None
        return one.plan.memory.peak, one.plan.seconds or 0.0, one.plan.adapter_bytes, by_quality.index(one)

    def beaten(one: Candidate) -> bool:
        return any(
            all(a <= b for a, b in zip(costs(other), costs(one), strict=True)) and costs(other) != costs(one)
            for other in inside
        )

    return [replace(one, pareto=one in inside and not beaten(one)) for one in ranked]


def _evidence(runs: Iterable[Path], data: str) -> dict[str, list[float]]:
    """The qualities that the cells of these run folders measured on that data, by method and storage."""
    found: dict[str, list[float]] = {}
    for run in runs:
        results = sorted(Path(run).glob("cells/*/result.json"))
        results += [file for file in (Path(run) / "result.json",) if file.is_file()]
        if not results:
            raise UserError(f"{run} has no finished run", "give the folder that `deltatune compare` wrote")
        for file in results:
            result, spec = read_json(file), read_json(file.with_name("spec.json"))
            if Path(str(spec["data"]["name"])).name != Path(data).name:
                continue
            storages = {str(words).partition(":")[0] for words in spec["method"]["storage"].values()}
            words = "@".join([result["method"], *storages][:2])
            found.setdefault(words, []).append(float(result["test"][result["metric"]]))
    return found


def _tried(one: Candidate, base: str, data: TextData | DialogueData, settings: Training, budget: float) -> Candidate:
    """The candidate with what a trial of so many seconds found: its quality, or why it is out."""
    try:
        quality = _trial(one, base, data, settings, budget)
    except UserError as error:  # it diverges, say
        return replace(one, out=f"its trial failed: {error.message}")
    return replace(one, quality=quality, evidence=f"a trial of {budget:.0f} s")


def _trial(one: Candidate, base: str, data: TextData | DialogueData, settings: Training, budget: float) -> float:
    """The quality on validation after as many steps as the budget allows; loading and scoring are paid from it."""
    assert one.plan is not None
    began = time.perf_counter()
    loaded = load(base, labels=data.labels, storage=one.storage)
    left = max(1.0, budget - (time.perf_counter() - began)) / 2
    share = min(1.0, left / max(1e-9, one.plan.seconds or 1.0))
    short = settings.model_copy(update={"epochs": max(0.001, settings.epochs * share), "evaluations": 1})
    some = data.limited(None, min(len(data.validation), 200), None, seed=0)
    scores = tune(loaded, some, make(*parse(one.method)), short).validation
    return scores.quality if scores.metric != "loss" else -scores.loss
