"""The plan of a run: how many parameters, bytes and seconds each method takes on a base, before anything is loaded."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from deltatune.data import DialogueData, TextData
from deltatune.data.batches import ROWS, STEP, by_length, epoch
from deltatune.data.tokens import length_limit
from deltatune.errors import UserError
from deltatune.methods import METHODS, Method, make, parse
from deltatune.models.base import Base, read_tokenizer, tasks
from deltatune.models.count import Counted, count_on
from deltatune.models.places import Place
from deltatune.models.quantise import Storages
from deltatune.models.roles import unchanged
from deltatune.planning.bases import planned_base, planned_outline
from deltatune.planning.batches import batch_shapes
from deltatune.planning.calibration import this_machine
from deltatune.planning.machine import Machine, read_machine
from deltatune.planning.memory import Memory, kernels, memory_of
from deltatune.planning.rehearsal import BatchShape, Rehearsed, rehearse
from deltatune.planning.work import OWN_PRODUCT
from deltatune.training.modes import SCORED_TOKENS
from deltatune.training.pieces import FOR_A_CPU
from deltatune.training.precision import Computed
from deltatune.training.settings import Training
from deltatune.training.tasks import task_for

_ADAMW = 28 + 12
"""Bytes that AdamW and clipping read and write for each trained number: parameter, gradient and two moments."""


@dataclass(frozen=True)
class Plan:
    """What one method costs on one base."""

    base: str
    method: str
    """As the user wrote it, with its options."""
    storage: str
    counted: Counted
    adapter_bytes: int
    """Of the file that holds what was trained, its header left out."""
    memory: Memory
    flops: float
    """Operations of a step's products."""
    step_seconds: float
    seconds: float | None
    """Of the whole run's steps; None where nobody said how long it is."""
    making_seconds: float
    """Of these, what making kernels takes: once for each size of a batch."""
    tokens: int
    """Of a batch, as many as are computed: padding included, where there is some."""
    machine: str
    fits: bool
    """Whether the peak is within the machine's memory."""
    kept: Mapping[str, float] = field(default_factory=dict)
    """What is kept for the backward pass, by the modules that make it; where that was asked for."""

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "base": self.base,
            "method": self.method,
            "storage": self.storage,
            "trainable": self.counted.trainable,
            "total": self.counted.total,
            "stored": self.counted.stored,
            "adapter_bytes": self.adapter_bytes,
            "memory": {
                name: value if isinstance(value, str) else round(value) for name, value in self.memory.terms().items()
            },
            "flops": round(self.flops),
            "step_seconds": self.step_seconds,
            "seconds": self.seconds,
            "batch_tokens": self.tokens,
            "machine": self.machine,
            "fits": self.fits,
            **({"kept": {name: round(size) for name, size in self.kept.items()}} if self.kept else {}),
        }


@dataclass(frozen=True)
class Refused:
    """A method that cannot be planned on a base, and why."""

    method: str
    reason: str


@dataclass(frozen=True)
class _Planned:
    """What the plans of several methods on one base share."""

    place: Place
    outline: PreTrainedModel
    machine: Machine
    precision: Computed
    settings: Training
    batch: BatchShape
    scoring: BatchShape
    steps: int | None
    storage: str
    file: float
    loaded: float
    forked: bool
    shapes: tuple[int, int] = (1, 1)
    """How many different sizes batches have, of steps and of what is scored."""


def plan(
    base: str,
    methods: str | Method | Iterable[str | Method] = "all",
    *,
    storage: Storages = "",
    tokens: int = 1024,
    length: int = 128,
    scored: int | None = None,
    labels: Sequence[str] | None = None,
    examples: int | None = None,
    settings: Training | None = None,
    machine: str | Machine = "",
    explain: bool = False,
) -> list[Plan | Refused]:
    """Plans each method: `all`, one, or several, in words such as `lora:rank=8`; nothing of the base is loaded.

    A batch has `tokens` tokens in examples of `length`, of which `scored` carry a loss (a quarter, where that is left
    out) if the base is to write; with `labels`, or a base that cannot write, it is a classifier. `examples` are those
    of an epoch: with them a plan says how long the run takes. `machine` is the name or file of one, this one otherwise.
    Raises `UserError` for a base, method, storage or machine that does not exist.
    """
    place = planned_base(base)
    if labels is None:
        labels = () if "generation" in tasks(place) else ("0", "1")
    outline = planned_outline(place, labels, storage)
    settings = settings or Training(batch_tokens=tokens, max_length=max(2, length))
    shape = BatchShape(max(1, tokens // length), length, 0 if labels else scored or max(1, tokens // 4))
    if outline.config.is_encoder_decoder and not labels:
        half = max(1, length // 4)
        shape = BatchShape(max(1, tokens // (length + half)), length, shape.examples * half, half)
    steps = None
    if examples is not None:
        steps = math.ceil(math.ceil(examples / shape.examples) * settings.epochs / settings.accumulate)
    shared = _shared(place, outline, settings, shape, shape.scaled(SCORED_TOKENS), steps, storage, machine)
    found: list[Plan | Refused] = []
    with unchanged(outline):
        for words, method in _chosen(methods):
            try:
                if isinstance(method, UserError):
                    raise method
                found.append(_plan(words, method, shared, explain))
            except UserError as error:
                if methods != "all":
                    raise
                found.append(Refused(words, error.message))
    return found


def plan_run(
    base: str | Place,
    data: TextData | DialogueData,
    method: Method,
    settings: Training,
    *,
    storage: Storages = "",
    machine: str | Machine = "",
    seed: int = 0,
    forked: bool = False,
) -> Plan:
    """The plan of a run on these very examples: memory by their largest batch, time by all of them.

    `forked`: as a run of a comparison, in a process that shares what another one has imported.
    """
    place = base if isinstance(base, Place) else planned_base(base)
    outline = planned_outline(place, data.labels, storage)
    tokenizer = read_tokenizer(place, outline)
    task = task_for(Base(outline, tokenizer, place.id, place.revision), "fp32")
    limit = length_limit(tokenizer, outline.config, settings.max_length, getattr(method, "virtual_tokens", 0))
    examples, validation = task.encode(data.train, limit), task.encode(data.validation, limit)
    order = epoch(examples.lengths, settings.batch_tokens, np.random.default_rng(seed))
    machine = _machine(machine)
    own = f"{OWN_PRODUCT} bfloat16" in machine.products and "products" not in settings.plain
    step = 1 if own and settings.precision != "fp32" else STEP
    shapes = batch_shapes(examples, order, outline, method, settings, step, training=True)
    by_size = by_length(validation.lengths, SCORED_TOKENS)
    scored = batch_shapes(validation, by_size, outline, method, settings, step, training=False)
    largest, most = (max(several, key=lambda shape: (shape.tokens, shape.length)) for several in (shapes, scored))
    steps = math.ceil(len(order) * settings.epochs / settings.accumulate)
    shared = _shared(place, outline, settings, largest, most, steps, storage, machine, forked)
    steps_sizes, scored_sizes = (len({_size(shape, outline) for shape in several}) for several in (shapes, scored))
    made = _plan(method.name, method, replace(shared, shapes=(steps_sizes, scored_sizes)), False)
    middle = statistics.fmean(shape.tokens for shape in shapes) / largest.tokens
    return replace(made, seconds=made.step_seconds * middle * steps + made.making_seconds)


def _size(shape: BatchShape, outline: PreTrainedModel) -> int:
    """The tokens of a batch as far as they make a difference to its products."""
    return -(-shape.tokens // ROWS) if outline.can_generate() else shape.tokens


def _shared(
    place: Place,
    outline: PreTrainedModel,
    settings: Training,
    batch: BatchShape,
    scoring: BatchShape,
    steps: int | None,
    storage: Storages,
    machine: str | Machine,
    forked: bool = False,
) -> _Planned:
    found = _machine(machine)
    precision: Computed = found.precision if settings.precision == "auto" else settings.precision
    words = storage if isinstance(storage, str) else str(dict(storage))
    held = {id(tensor): tensor for tensor in (*outline.parameters(), *outline.buffers())}
    # Bases are loaded in fp32, whatever the run computes in.
    loaded = sum(t.numel() * 4 if t.is_floating_point() else t.nbytes for t in held.values())
    file = _file_bytes(place, outline)
    return _Planned(place, outline, found, precision, settings, batch, scoring, steps, words, file, loaded, forked)


def _machine(machine: str | Machine) -> Machine:
    return machine if isinstance(machine, Machine) else read_machine(machine) if machine else this_machine()


def _file_bytes(place: Place, outline: PreTrainedModel) -> float:
    folder = Path(place.source).expanduser()
    if place.config is None and folder.is_dir():
        return float(sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    return float(2 * sum(parameter.numel() for parameter in outline.parameters()))


def _chosen(methods: str | Method | Iterable[str | Method]) -> list[tuple[str, Method | UserError]]:
    if methods == "all":
        return [(name, _made(name)) for name in METHODS]
    several = [methods] if isinstance(methods, (str, Method)) else list(methods)
    return [(one, make(*parse(one))) if isinstance(one, str) else (one.name, one) for one in several]


def _made(name: str) -> Method | UserError:
    try:
        return make(name)
    except UserError as error:
        return error


def _plan(words: str, method: Method, shared: _Planned, explain: bool) -> Plan:
    counted = count_on(shared.outline, method)
    machine, settings = shared.machine, shared.settings
    rehearsed = rehearse(
        shared.outline,
        method,
        shared.batch,
        shared.precision,
        trained=counted.trainable,
        scoring=shared.scoring,
        checkpoint=settings.gradient_checkpointing,
        plain=(*settings.plain, *FOR_A_CPU) if machine.cuda else settings.plain,
        explain=explain,
    )
    memory = memory_of(
        rehearsed,
        machine,
        settings,
        loaded=shared.loaded,
        file=shared.file,
        forked=shared.forked,
        classifier=not shared.outline.can_generate(),
        shapes=shared.shapes,
    )
    making = machine.making * kernels(rehearsed.step) * shared.shapes[0]
    step = settings.accumulate * machine.seconds(rehearsed.step) + _optimiser_seconds(rehearsed, machine)
    return Plan(
        base=shared.place.id,
        method=words,
        storage=shared.storage,
        counted=counted,
        adapter_bytes=4 * counted.stored,
        memory=memory,
        flops=rehearsed.step.flops * settings.accumulate,
        step_seconds=step,
        seconds=None if shared.steps is None else step * shared.steps + making,
        making_seconds=making,
        tokens=shared.batch.tokens * settings.accumulate,
        machine=machine.name,
        fits=memory.peak <= machine.memory,
        kept=dict(rehearsed.step.kept.most_common()),
    )


def _optimiser_seconds(rehearsed: Rehearsed, machine: Machine) -> float:
    moved = _ADAMW * rehearsed.trained
    if machine.bandwidth:
        return moved / machine.bandwidth
    points = machine.moves["mul float32"]
    size, took = points[-1]
    return moved * took / size
