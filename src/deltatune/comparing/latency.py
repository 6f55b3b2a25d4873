"""How long one forward pass takes: of the base, with the adapter beside its weights, and with it merged into them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, cast

from transformers import PreTrainedModel

from deltatune.comparing.results import Latency
from deltatune.data.batches import Batch
from deltatune.errors import UserError
from deltatune.models.attach import Attachment, attachment, disabled
from deltatune.models.base import Base
from deltatune.models.merge import merge, unmerge
from deltatune.training.modes import evaluating
from deltatune.training.precision import Computed
from deltatune.training.task import Task
from deltatune.training.tasks import task_for

_SECONDS = 0.2
"""How long all rounds may take, once there are three: what a cell measures must not cost what it measures."""
_ROUNDS = 15
_PASSES = 2
"""Forward passes in a row of each in a round; the faster counts."""


def measure_latency(base: Base, test: Any, max_length: int, precision: Computed) -> Latency:
    """Times single test examples of middling length, the variants in turn. The model is left as it was.

    One process times it beside whatever else the machine does: compare the three figures with each other, not with
    those of other machines.
    """
    task = task_for(base, precision)
    tokens, batch = _middling(task, test, max_length)
    done = cast(Attachment, attachment(base.model))
    adds = not all(part.trains_base for part in done.parts)

    def timed() -> float:
        """Seconds of the faster of a few passes."""
        with evaluating(base.model):
            return min(_seconds(lambda: task.run(batch)) for _ in range(_PASSES))

    timed()  # the first pass makes kernels
    began = time.perf_counter()
    times: dict[str, list[float]] = {"base": [], "adapted": [], "merged": []}
    for done_rounds in range(_ROUNDS):
        if done_rounds >= 3 and time.perf_counter() - began > _SECONDS:
            break
        times["adapted"].append(timed())
        if adds:
            with disabled(base.model):
                times["base"].append(timed())
            with _merged(base.model) as merges:
                if merges:
                    times["merged"].append(timed())
    adapted = median(times["adapted"])
    return Latency(
        tokens=tokens,
        rounds=len(times["adapted"]),
        base=median(times["base"] or [adapted]),
        adapted=adapted,
        merged=median(times["merged"]) if times["merged"] else None if adds else adapted,
    )


def _middling(task: Task, test: Any, max_length: int) -> tuple[int, Batch]:
    """The test example in the middle by length, alone in a batch, and its number of tokens."""
    examples = task.encode(test, max_length)
    place = sorted(range(len(examples)), key=examples.lengths.__getitem__)[len(examples) // 2]
    return examples.lengths[place], task.collate(examples, [place])


@contextmanager
def _merged(model: PreTrainedModel) -> Iterator[bool]:
    """Within the block the adapter is merged, where it can be."""
    try:
        merge(model)
    except UserError:
        yield False
        return
    try:
        yield True
    finally:
        unmerge(model)


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
