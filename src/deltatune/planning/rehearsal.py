"""A rehearsal: a training step and a scored batch of a base with a method, run on shapes alone (see `tracing.py`).

The blocks of a model are alike, so a deep one is rehearsed with few of them: what one block more costs, times the
blocks left out, is what they cost. That this holds is checked by the trained parameters, which are counted exactly;
where it does not (a target names one block in the middle), all blocks are rehearsed.
"""

import copy
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from deltatune.data.batches import Batch
from deltatune.dropout import replace_dropout
from deltatune.errors import UserError
from deltatune.methods import Method
from deltatune.models import short_attention
from deltatune.models.attach import attach, penalty, trainable_parameters
from deltatune.models.base import Base, quiet
from deltatune.models.blocks import stacks
from deltatune.models.norms import replace_norms
from deltatune.planning.tracing import Shape, Trace, Traced, shaped
from deltatune.training.attention import SHORT
from deltatune.training.checkpointing import checkpointing
from deltatune.training.classification import Classification
from deltatune.training.language import LanguageModelling
from deltatune.training.modes import SCORED_TOKENS
from deltatune.training.pooled import end_of_attention, first_token_alone
from deltatune.training.precision import Computed, prepare
from deltatune.training.prefix import Prefix
from deltatune.weights import scratch_apart

_FEW = 8
"""Blocks up to which a model is rehearsed as it is."""
_DEPTHS = (2, 4)
"""With how many blocks of each stack a deep model is rehearsed, first; then with one more. What goes into the first
block is not yet what a block leaves behind, so one block alone would say too much of the others."""


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
    short: bool = True,
    explain: bool = False,
) -> Rehearsed:
    """Rehearses a method on an outline, which is left as it is; `trained` is the exact count of what trains.

    `scoring` is the largest batch of a validation; left out, one of the same lengths.
    `short`: whether the machine runs its own attention over short texts (see `training/attention.py`).
    """
    large = scoring or batch.scaled(SCORED_TOKENS)
    depths = [len(stack) for stack in stacks(base)]
    deepest = max(depths, default=0)
    for first in _DEPTHS:
        if deepest <= _FEW or len(set(depths)) > 1:
            break
        try:
            one, two = (
                _rehearse(_cut(base, first + more), method, batch, large, precision, checkpoint, short, explain)
                for more in (0, 1)
            )
        except UserError:  # what it wants of the model is not in so few blocks
            continue
        whole = _extended(one, two, deepest - first)
        if round(whole.trained) == trained:
            return whole
    return _rehearse(copy.deepcopy(base), method, batch, large, precision, checkpoint, short, explain)


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


def _extended(one: Rehearsed, two: Rehearsed, blocks: int) -> Rehearsed:
    """What `blocks` blocks more than in `one` come to, where `two` has one more."""

    def extended(a: float, b: float) -> float:
        return a + blocks * (b - a)

    def traced(a: Traced, b: Traced) -> Traced:
        return Traced(
            Counter({work: extended(a.work[work], b.work[work]) for work in a.work | b.work}),
            cast(Any, tuple(map(extended, a.peaks, b.peaks))),
            extended(a.forward, b.forward),
            extended(a.calls, b.calls),
            Counter({name: extended(a.kept[name], b.kept[name]) for name in a.kept | b.kept}),
        )

    return Rehearsed(
        traced(one.step, two.step),
        traced(one.scoring, two.scoring),
        extended(one.frozen, two.frozen),
        extended(one.trained, two.trained),
    )


def _rehearse(
    model: PreTrainedModel,
    method: Method,
    batch: BatchShape,
    large: BatchShape,
    precision: Computed,
    checkpoint: bool,
    short: bool,
    explain: bool,
) -> Rehearsed:
    with scratch_apart(), _nothing_remembered(), quiet(), _silent():
        with Trace():
            attach(model, method)
        prepare(model, precision)
        replace_dropout(model)
        replace_norms(model)
        if short and batch.length <= SHORT:
            model.set_attn_implementation(short_attention.NAME)
        shaped(model)
        generation = model.can_generate()
        base = Base(model, cast(Any, None), "", "")
        task = (
            LanguageModelling(base, precision, chunked=True, packed=False)
            if generation
            else Classification(base, precision)
        )
        parameters = trainable_parameters(model)
        with Trace() as frozen_below:
            model.train()
            one = _batch(replace(batch, examples=1, scored=min(batch.scored, batch.length)), model)
            Prefix(model).freeze(lambda: task.run(one))
        del frozen_below
        first = nullcontext() if generation or end_of_attention(model) is None else first_token_alone(model)
        with Trace(batch.scored, model) as stepping, first, checkpointing(model, checkpoint), ExitStack() as hooks:
            if explain:
                stepping.places = _places(model, hooks)
            if parameters:
                task.backward(_batch(batch, model), 1)
                if (extra := penalty(model)) is not None:
                    extra.backward()  # type: ignore[no-untyped-call]
        model.zero_grad()
        model.eval()
        with Trace(large.scored, model) as scoring, torch.no_grad():  # views of shapes do not work in inference mode
            if isinstance(task, LanguageModelling):
                hidden, targets, _ = task._scored(_batch(large, model))
                for rows, _ in task._chunks(hidden, targets):
                    task._logits(rows).float()
            else:
                task.run(_batch(large, model)).float()
        held = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        total = sum(tensor.nbytes for tensor in held.values())
        numbers = sum(parameter.numel() for parameter in parameters.values())
        return Rehearsed(stepping.traced, scoring.traced, total - 4 * numbers, numbers)


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
        for name, module in [*sys.modules.items()]:
            if name.startswith("deltatune.methods.") and not name.endswith(".registry"):
                for value in [*vars(module).values()]:
                    if hasattr(value, "cache_clear"):
                        value.cache_clear()
