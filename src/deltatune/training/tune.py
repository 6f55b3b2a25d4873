"""One training run from end to end: attach a method to a base, train it on data, keep the best, score it."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deltatune.data.batches import collate, epoch
from deltatune.data.examples import TextData
from deltatune.data.tokens import Tokens, length_limit, tokenize
from deltatune.dropout import replace_dropout
from deltatune.methods import Method, Mixed, SoftPrompt
from deltatune.models.attach import attach
from deltatune.models.base import Base, originals
from deltatune.training.attention import choose_attention
from deltatune.training.evaluation import Scores
from deltatune.training.events import Finished, Listener
from deltatune.training.loop import train
from deltatune.training.precision import Computed, prepare, resolve
from deltatune.training.settings import Training

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


def ignore(_: object) -> None:
    """A listener that does nothing."""


def tune(
    base: Base,
    data: TextData,
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
    method = _with_token_ids(method, base.tokenizer)
    virtual_tokens = getattr(method, "virtual_tokens", 0)
    limit = length_limit(base.tokenizer, model.config, settings.max_length, virtual_tokens)
    examples = tokenize(data.train, base.tokenizer, limit)
    first = _first_batches(examples, settings, seed, model.config.pad_token_id)
    attach(model, method, seed=seed, examples=first, originals=originals(base))
    rate = settings.learning_rate or method.learning_rate
    precision = resolve(settings.precision, model.device)
    prepare(model, precision)
    replace_dropout(model)
    choose_attention(model, limit)
    validation: Tokens = tokenize(data.validation, base.tokenizer, limit)
    finished, scores = train(
        model, examples, validation, settings, learning_rate=rate, precision=precision, seed=seed, listen=listen
    )
    settings = settings.model_copy(update={"learning_rate": rate, "precision": precision})
    return Tuned(base, method, settings, precision, limit, finished, scores, examples.truncated)


def _with_token_ids(method: Method, tokenizer: PreTrainedTokenizerBase) -> Method:
    """The method with the tokens of the text that it begins with, where it has one."""
    if isinstance(method, Mixed):
        return Mixed(*(_with_token_ids(part, tokenizer) for part in method.parts))
    if not isinstance(method, SoftPrompt):
        return method
    return method.tokenised(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])


def _first_batches(examples: Tokens, settings: Training, seed: int, pad: int) -> Iterator[dict[str, Tensor]]:
    """What the run trains on first, for a method that takes its first values from examples; made as it reads them."""
    order = epoch(examples.lengths, settings.batch_tokens, np.random.default_rng(seed))
    for places in order[:_OBSERVED]:
        batch = collate(examples, places, pad)
        yield {**batch.inputs, "labels": batch.labels}
