"""Whether a run will fit, before it is loaded; and where it will not, which nearest settings would."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from deltatune.data import DialogueData, TextData
from deltatune.errors import UserError
from deltatune.methods import Method, OverLayers
from deltatune.models.places import Place
from deltatune.models.quantise import Storages
from deltatune.planning.calibration import this_machine
from deltatune.planning.machine import Machine
from deltatune.planning.plan import Plan, plan_run
from deltatune.training.settings import Training


@dataclass(frozen=True)
class Foreseen:
    """A plan with all that it was made from, so that others like it can be made."""

    plan: Plan
    place: Place
    data: TextData | DialogueData
    method: Method
    settings: Training
    storage: Storages
    machine: Machine
    forked: bool = False
    """Whether it is a run of a comparison."""


def foresee(
    place: Place,
    data: TextData | DialogueData,
    method: Method,
    settings: Training,
    *,
    storage: Storages = "",
    seed: int = 0,
    forked: bool = False,
    machine: Machine | None = None,
) -> Foreseen:
    """Plans a run on this machine, or on the given one. Raises `UserError` as the run itself would."""
    machine = machine or this_machine()
    made = plan_run(place, data, method, settings, storage=storage, seed=seed, forked=forked, machine=machine)
    return Foreseen(made, place, data, method, settings, storage, machine, forked)


def refuse_unfit(foreseen: Foreseen) -> None:
    """Raises `UserError` where the plan exceeds the machine's memory, with the nearest settings that fit."""
    if foreseen.plan.fits:
        return
    most = foreseen.machine.memory
    fitting = [words for words, plan in _nearest(foreseen) if plan.memory.peak <= most][:3]
    raise UserError(
        f"this run would take {foreseen.plan.memory.peak / 1e9:.1f} GB while {foreseen.plan.memory.fullest}, and there "
        f"are {most / 1e9:.1f} GB",
        (f"these would fit: {'; '.join(fitting)}" if fitting else "take a smaller base")
        + "; --force tries it all the same",
    )


def _nearest(foreseen: Foreseen) -> Iterator[tuple[str, Plan]]:
    """Settings that take less memory, in words of the command line, with their plans: the nearest first."""
    settings = foreseen.settings
    half = settings.batch_tokens // 2
    changes: dict[str, dict[str, Any]] = {
        "--training gradient_checkpointing=true": {"gradient_checkpointing": True},
        f"--training batch_tokens={half}": {"batch_tokens": half},
        f"--training batch_tokens={half // 4}": {"batch_tokens": half // 4},
        "--training optimiser=adamw8bit": {"optimiser": "adamw8bit"},
    }
    less = settings.model_copy(update={"gradient_checkpointing": True, "batch_tokens": max(1, half // 4)})
    tries = [(words, settings.model_copy(update=change), foreseen.storage) for words, change in changes.items()]
    if isinstance(foreseen.method, OverLayers) and not foreseen.storage:
        quantised = "storage=nf4 of the method" if foreseen.forked else "--storage nf4"
        tries.append((quantised, settings, "nf4"))
        both = f"{quantised} --training gradient_checkpointing=true --training batch_tokens={max(1, half // 4)}"
        tries.append((both, less, "nf4"))
    for words, changed, storage in tries:
        if changed.batch_tokens < 1:
            continue
        near = replace(foreseen, settings=changed, storage=storage)
        yield (
            words,
            plan_run(
                near.place, near.data, near.method, changed, storage=storage, machine=near.machine, forked=near.forked
            ),
        )
