"""A rehearsal: a training step and a scored batch of a base with a method, run on shapes alone (see `tracing.py`).

The blocks of a model are alike, so a deep one is rehearsed with few of them, and one of these stands for those that
were left out. That this holds is checked by the trained parameters, which are counted exactly; where it does not (a
target names one block in the middle), all blocks are rehearsed.
"""

import copy
import logging
import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from deltatune.data.batches import Batch
from deltatune.errors import UserError
from deltatune.methods import Method, SoftPrompt
from deltatune.models.attach import attach, parts_of, penalty, trainable_parameters
from deltatune.models.base import Base, quiet
from deltatune.models.blocks import stacks
from deltatune.models.targets import below
from deltatune.planning.shapes import Shape, shaped
from deltatune.planning.tracing import Repeat, Trace
from deltatune.planning.work import Traced
from deltatune.training.checkpointing import checkpointing
from deltatune.training.classification import Classification
from deltatune.training.language import LanguageModelling
from deltatune.training.modes import SCORED_TOKENS
from deltatune.training.pieces import Piece, quicken
from deltatune.training.pooled import end_of_attention, first_token_alone
from deltatune.training.precision import Computed, prepare
from deltatune.training.prefix import Prefix
from deltatune.training.task import Task
from deltatune.weights import scratch_apart

_CUTS = ((3, 1), (5, 1), (5, 3))
"""With how many blocks of each stack a deep model is rehearsed, and which of them stands for those left out: one
between two others, since what goes into the first is not yet what a block leaves behind."""


@dataclass(frozen=True)
class BatchShape:
    """The size of a padded batch."""

    examples: int
    length: int
    """Tokens of each, padding included."""
    scored: int = 0
    """Tokens whose loss is learnt, in all examples together; 0 for a classifier."""
    target: int = 0
    """Tokens of each target that an encoder–decoder writes."""

    @property
    def tokens(self) -> int:
        """Tokens of all examples, padding included."""
        return self.examples * (self.length + self.target)

    def scaled(self, tokens: int) -> "BatchShape":
        """As many examples of the same lengths as fit into so many tokens, one at least."""
        examples = max(1, tokens // self.length)
        return replace(self, examples=examples, scored=self.scored * examples // self.examples)


@dataclass(frozen=True)
class Rehearsed:
    """What was seen of one method on one base."""

    step: Traced
    """Forward, loss and backward of one batch. What it leaves are gradients."""
    scoring: Traced
    """One batch of the size that is scored in a validation."""
    frozen: float
    """Bytes of what does not train, buffers included, in the run's types."""
    trained: float
    """Numbers that train."""


def rehearse(
    base: PreTrainedModel,
    method: Method,
    batch: BatchShape,
    precision: Computed,
    *,
    trained: int,
    scoring: BatchShape | None = None,
    checkpoint: bool = False,
    plain: Collection[Piece] = (),
    explain: bool = False,
) -> Rehearsed:
    """Rehearses a method on an outline, which is left as it is; `trained` is the exact count of what trains.

    `scoring` is the largest batch of a validation; left out, one of the same lengths.
    `plain`: the fast pieces that the run goes without (see `training/pieces.py`).
    """
    rehearsal = _Rehearsal(
        method, batch, scoring or batch.scaled(SCORED_TOKENS), precision, trained, checkpoint, plain, explain
    )
    depths = {len(stack) for stack in stacks(base)}
    for few, middle in _CUTS if len(depths) == 1 else ():
        if (more := depths.copy().pop() - few) > 0:
            with suppress(UserError):  # what it wants of the model is not in so few blocks
                if found := rehearsal.of(_cut(base, few), middle, more):
                    return found
    whole = rehearsal.of(copy.deepcopy(base))
    assert whole is not None, "nothing stands for anything else"
    return whole


def _cut(base: PreTrainedModel, blocks: int) -> PreTrainedModel:
    """A copy with the first blocks of each stack alone."""
    taken = {path.rpartition(".")[0]: base.get_submodule(path.rpartition(".")[0]) for path, *_ in stacks(base)}
    try:
        for path, whole in taken.items():
            base.set_submodule(path, cast(nn.ModuleList, whole)[:blocks])
        return copy.deepcopy(base)
    finally:
        for path, whole in taken.items():
            base.set_submodule(path, whole)


@dataclass(frozen=True)
class _Rehearsal:
    """What is rehearsed, whatever the number of blocks."""

    method: Method
    batch: BatchShape
    large: BatchShape
    precision: Computed
    trained: int
    checkpoint: bool
    plain: Collection[Piece]
    explain: bool

    def of(self, model: PreTrainedModel, middle: int = 0, more: int = 0) -> Rehearsed | None:
        """Rehearses it on a model of its own, whose block number `middle` stands for so many more of each stack.

        None where not as much would train as does: the blocks are not alike.
        """
        with scratch_apart(), _nothing_remembered(), quiet(), _silent():
            with Trace():
                attach(model, self.method)
            blocks = [stack[middle : middle + 2] for stack in stacks(model)] if more else []
            parameters = trainable_parameters(model)
            numbers = sum(parameter.numel() for parameter in parameters.values())
            one = _held_by([block for block, _ in blocks], model)
            each = sum(tensor.numel() for tensor in one if tensor.requires_grad)
            soft = all(isinstance(part, SoftPrompt) for part in parts_of(self.method))  # has the same for every block
            if numbers + more * each != self.trained and not (soft and more):
                return None
            task = self._prepared(model)
            step = self._step(model, task, blocks, more)
            scored = self._scored(model, task, blocks, more)
            held = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
            one = _held_by([block for block, _ in blocks], model)
            frozen = sum(t.nbytes for t in held.values()) - 4 * numbers
            return Rehearsed(step, scored, frozen + more * (sum(t.nbytes for t in one) - 4 * each), self.trained)

    def _prepared(self, model: PreTrainedModel) -> Task:
        prepare(model, self.precision)
        quicken(model, self.batch.length, self.plain)
        shaped(model)
        base = Base(model, cast(Any, None), "", "")
        task: Task = (
            LanguageModelling(base, self.precision, chunked=True, packs=False)
            if model.can_generate()
            else Classification(base, self.precision)
        )
        with Trace():
            model.train()
            one = _batch(replace(self.batch, examples=1, scored=min(self.batch.scored, self.batch.length)), model)
            Prefix(model).freeze(lambda: task.run(one))
        return task

    def _step(self, model: PreTrainedModel, task: Task, blocks: list[list[str]], more: int) -> Traced:
        whole = "pooled" in self.plain or model.can_generate() or end_of_attention(model) is None
        alone = nullcontext() if whole else first_token_alone(model)
        trace = Trace(self.batch.scored)
        with trace, scratch_apart(), alone, checkpointing(model, self.checkpoint), ExitStack() as hooks:
            if self.explain:
                trace.places = _places(model, hooks)
            _repeat(trace, model, blocks, more, hooks)
            if trainable_parameters(model):
                task.backward(_batch(self.batch, model), 1)
                begin = trace.now
                if (extra := penalty(model)) is not None:
                    extra.backward()  # type: ignore[no-untyped-call]
                if more:  # a penalty is about all blocks
                    trace.repeats.append(Repeat(more / len(stacks(model)[0]), [begin, trace.now, trace.now]))
        model.zero_grad()
        return trace.traced

    def _scored(self, model: PreTrainedModel, task: Task, blocks: list[list[str]], more: int) -> Traced:
        model.eval()
        trace = Trace(self.large.scored)
        with trace, scratch_apart(), torch.no_grad(), ExitStack() as hooks:  # inference mode has no views of shapes
            _repeat(trace, model, blocks, more, hooks)
            if isinstance(task, LanguageModelling):
                hidden, targets, _ = task._scored(_batch(self.large, model))
                for rows, _ in task._chunks(hidden, targets, scoring=True):
                    task._logits(rows).float()
            else:
                task.run(_batch(self.large, model)).float()
        return trace.traced


def _held_by(blocks: list[str], model: nn.Module) -> list[torch.Tensor]:
    """The parameters and buffers that these blocks alone hold."""
    within, outside = dict[int, torch.Tensor](), set[int]()
    for path, module in model.named_modules(remove_duplicate=False):
        held = [one for one in (*module._parameters.values(), *module._buffers.values()) if one is not None]
        if below(path, blocks):
            within.update((id(one), one) for one in held)
        else:
            outside.update(map(id, held))
    return [tensor for key, tensor in within.items() if key not in outside]


def _repeat(trace: Trace, model: nn.Module, blocks: list[list[str]], times: int, hooks: ExitStack) -> None:
    """Lets the first block of each pair be traced so many times more, from its beginning to that of the second."""
    for pair in blocks:
        trace.repeats.append(Repeat(times))

        def enter(_: Any, args: Any, kwargs: Any, repeat: Repeat = trace.repeats[-1]) -> None:
            if torch._C._current_graph_task_id() != -1:  # it is computed again
                return
            repeat.forward.append(trace.now)
            values = (*args, *kwargs.values())
            x = next(one for one in values if isinstance(one, torch.Tensor) and one.is_floating_point())
            if x.requires_grad:
                x.register_hook(lambda _: repeat.backward.append(trace.now))  # type: ignore[no-untyped-call]

        def leave(*_: Any, repeat: Repeat = trace.repeats[-1]) -> None:
            if torch._C._current_graph_task_id() == -1:
                repeat.forward.append(trace.now)

        first, second = map(model.get_submodule, pair)
        hooks.callback(first.register_forward_pre_hook(enter, with_kwargs=True).remove)
        hooks.callback(second.register_forward_pre_hook(enter, with_kwargs=True).remove)
        hooks.callback(second.register_forward_hook(leave).remove)


def _batch(shape: BatchShape, model: PreTrainedModel) -> Batch:
    """A batch of that shape, without any numbers."""

    def ids(length: int) -> torch.Tensor:
        return Shape(torch.empty(shape.examples, length, dtype=torch.int64, device="meta"))

    inputs = {"input_ids": ids(shape.length), "attention_mask": ids(shape.length)}
    labels = Shape(torch.empty(shape.examples, dtype=torch.int64, device="meta"))
    if model.can_generate():
        labels = ids(shape.target or shape.length)  # type: ignore[assignment]
    return Batch(inputs, labels, (0,), shape.tokens, max(1, shape.scored or shape.examples))


def _places(model: nn.Module, hooks: ExitStack) -> list[str]:
    """The paths of the modules that run, the innermost last, kept up to date by hooks; a block's number is left out."""
    running: list[str] = [""]
    for path, module in model.named_modules():
        name = ".".join("*" if part.isdecimal() else part for part in path.split("."))

        def enter(*_: Any, name: str = name) -> None:
            running.append(name)

        def leave(*_: Any) -> None:
            running.pop()

        hooks.callback(module.register_forward_pre_hook(enter).remove)
        hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
    return running


@contextmanager
def _silent() -> Iterator[None]:
    """What is said of a model that is attached to is not said of its rehearsals."""
    log = logging.getLogger("deltatune")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def _nothing_remembered() -> Iterator[None]:
    """What methods remember of a rehearsal has no numbers: it is forgotten before anything real is computed."""
    try:
        yield
    finally:
        for remembers in _remembering():
            remembers.cache_clear()


@cache
def _remembering() -> list[Any]:
    """The functions of methods that remember what they gave."""
    modules = [
        module
        for name, module in sys.modules.items()
        if name.startswith("deltatune.methods.") and not name.endswith(".registry")
    ]
    every = {id(value): value for module in modules for value in vars(module).values()}
    return [value for value in every.values() if hasattr(value, "cache_clear")]
