"""One training run from end to end: attach a method to a base, train it on data, keep the best, score it."""

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deltatune.data import DialogueData, TextData
from deltatune.data.batches import epoch
from deltatune.data.tokens import length_limit
from deltatune.methods import Method, Mixed, SoftPrompt
from deltatune.models.attach import Attachment, attach, attachment, disabled
from deltatune.models.base import Base, originals
from deltatune.training.events import Finished, Listener
from deltatune.training.loop import train
from deltatune.training.pieces import quicken
from deltatune.training.plain_text import plain_text_loss, plain_text_states
from deltatune.training.precision import Computed, prepare, resolve
from deltatune.training.settings import Training
from deltatune.training.task import Examples, Scores, Task
from deltatune.training.tasks import check_task, task_for

log = logging.getLogger("deltatune")

_OBSERVED = 64
"""The most batches that a method may read before training; most stop long before."""


@dataclass(frozen=True)
class Tuned:
    """A trained base: its model carries the kept weights."""

    base: Base
    method: Method
    settings: Training
    """As it ran: the learning rate and precision are resolved."""
    precision: Computed
    max_length: int
    finished: Finished
    validation: Scores
    truncated: int
    """Training examples that were longer than `max_length`."""
    plain_text: float | None
    """Loss of the base on a fixed text that is not the task; None for a classifier."""
    plain_states: Tensor | None
    """What a classifier's base gave for the tokens of that text before training; None for a language model."""


def ignore(_: object) -> None:
    """A listener that does nothing."""


def tune(
    base: Base,
    data: TextData | DialogueData,
    method: Method,
    settings: Training | None = None,
    *,
    seed: int = 0,
    listen: Listener = ignore,
) -> Tuned:
    """Trains `method` on `base`, whose model is changed in place, with the examples of `data`.

    Raises `UserError` for targets that match nothing, for data that does not fit the base, and for a run that diverges.
    """
    settings = settings or Training()
    model = base.model
    check_task(base, data)
    method = _with_token_ids(method, base.tokenizer)
    virtual_tokens = getattr(method, "virtual_tokens", 0)
    limit = length_limit(base.tokenizer, model.config, settings.max_length, virtual_tokens)
    precision = resolve(settings.precision, model.device)
    task = task_for(base, precision, settings.plain)
    examples = task.encode(data.train, limit)
    if examples.truncated:
        log.warning(
            "%d of %d training examples are longer than %d tokens and lose a part (max_length)",
            *(examples.truncated, len(examples), limit),
        )
    attach(model, method, seed=seed, examples=_first_batches(task, examples, settings, seed), originals=originals(base))
    rate = settings.learning_rate or method.learning_rate
    prepare(model, precision)
    quicken(model, limit, settings.plain)
    with nullcontext() if cast(Attachment, attachment(model)).trains_base else disabled(model):
        plain_text, plain_states = plain_text_loss(base, precision), plain_text_states(base, precision)
    finished, scores = train(
        task,
        examples,
        task.encode(data.validation, limit),
        settings,
        learning_rate=rate,
        precision=precision,
        seed=seed,
        listen=listen,
    )
    settings = settings.model_copy(update={"learning_rate": rate, "precision": precision})
    return Tuned(
        base, method, settings, precision, limit, finished, scores, examples.truncated, plain_text, plain_states
    )


def _with_token_ids(method: Method, tokenizer: PreTrainedTokenizerBase) -> Method:
    """The method with the tokens of the text that it begins with, where it has one."""
    if isinstance(method, Mixed):
        return Mixed(*(_with_token_ids(part, tokenizer) for part in method.parts))
    if not isinstance(method, SoftPrompt):
        return method
    return method.tokenised(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])


def _first_batches(task: Task, examples: Examples, settings: Training, seed: int) -> Iterator[dict[str, Tensor]]:
    """What the run trains on first, for a method that takes its first values from examples; made as it reads them."""
    order = epoch(examples.lengths, settings.batch_tokens, np.random.default_rng(seed))
    for places in order[:_OBSERVED]:
        batch = task.collate(examples, places)
        yield {**batch.inputs, "labels": batch.labels}
