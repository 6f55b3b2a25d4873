"""The one loop that trains every method: batches in, events out, the kept weights left in the model."""

import math
import time
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from deltatune.data.batches import Batch, epoch
from deltatune.errors import DivergedError
from deltatune.models.attach import after_step, learning_rates, penalty, settled, trainable_parameters
from deltatune.models.quantise import total_parameters
from deltatune.training.checkpointing import checkpointing
from deltatune.training.events import Evaluated, Finished, Listener, Started, Step
from deltatune.training.memory import keep_freed
from deltatune.training.optimisers import make_optimiser
from deltatune.training.pooled import pooled
from deltatune.training.precision import Computed
from deltatune.training.prefix import Prefix
from deltatune.training.schedule import rate
from deltatune.training.settings import Training
from deltatune.training.task import Examples, Scores, Task


def train(
    task: Task,
    examples: Examples,
    validation: Examples,
    settings: Training,
    *,
    learning_rate: float,
    precision: Computed,
    seed: int,
    listen: Listener,
) -> tuple[Finished, Scores]:
    """Trains what is thawed in the task's model and leaves the kept weights in it; gives the last event, their scores.

    The order of examples, the dropout and so the result depend on `seed` alone. Raises `UserError`, with the first bad
    tensor named, when the loss or a gradient is not finite.
    """
    model = task.model
    parameters = trainable_parameters(model)
    if not parameters:
        return _untrained(task, examples, validation, precision, seed, listen)
    groups = _plan(examples, settings, seed)
    at = _validation_steps(len(groups), settings)
    optimizer = make_optimiser(
        settings.optimiser, parameters, learning_rates(model), settings.weight_decay, settings.paged_folder
    )
    kept = _Kept(settings.keep)
    listen(
        Started(
            steps=len(groups),
            epochs=settings.epochs,
            examples=len(examples),
            trainable=sum(p.numel() for p in parameters.values()),
            total=total_parameters(model),
            precision=precision,
            seed=seed,
        )
    )
    seconds, seen, tokens = 0.0, 0, 0
    if next(iter(parameters.values())).device.type == "cpu":
        keep_freed(settings.heap)
    model.train()
    prefix = Prefix(model, settings.cache, settings.cache_on)
    some = task.collate(examples, groups[0][0][:1])
    prefix.freeze(lambda: task.run(some))
    several = task.collate(examples, groups[0][0][:4])
    with (
        torch.random.fork_rng(),
        pooled(model, lambda: task.run(several), "pooled" not in settings.plain),
        checkpointing(model, settings.gradient_checkpointing),
    ):
        torch.manual_seed(seed)
        for step, group in enumerate(groups, start=1):
            began = time.perf_counter()
            current = learning_rate * rate(step - 1, len(groups), settings.warmup, settings.schedule)
            for part in optimizer.param_groups:
                part["lr"] = current * part["factor"]
            batches = [task.collate(examples, places) for places in group]
            loss = _accumulate(task, batches, prefix)
            if (extra := penalty(model)) is not None:
                extra.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(parameters.values(), settings.clip or math.inf).item()
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise _diverged(step, loss, parameters)
            optimizer.step()
            after_step(model, step, len(groups))
            optimizer.zero_grad()
            seconds += time.perf_counter() - began
            seen += sum(map(len, group))
            tokens += sum(batch.tokens for batch in batches)
            done = step / len(groups) * settings.epochs
            listen(Step(step, done, loss, current, norm, seen, tokens, seconds))
            if step in at:
                began = time.perf_counter()
                scores = task.evaluate(validation)
                took = time.perf_counter() - began
                if not math.isfinite(scores.loss):  # this step itself was too large, and no later one may tell
                    raise _diverged(step, scores.loss, {}, " on validation")
                listen(Evaluated(step, done, "validation", dict(scores.figures), len(validation), took))
                if settled(model, step, len(groups)):
                    kept.offer(step, scores, parameters)
                if settings.patience and kept.stale >= settings.patience:
                    break
    best_step, scores = kept.restore(parameters)
    finished = Finished(step, seconds, best_step)
    listen(finished)
    return finished, scores


def _untrained(
    task: Task, examples: Examples, validation: Examples, precision: Computed, seed: int, listen: Listener
) -> tuple[Finished, Scores]:
    """A run of no steps: what a language model does without any training."""
    listen(Started(0, 0.0, len(examples), 0, total_parameters(task.model), precision, seed))
    began = time.perf_counter()
    scores = task.evaluate(validation)
    listen(Evaluated(0, 0.0, "validation", dict(scores.figures), len(validation), time.perf_counter() - began))
    finished = Finished(0, 0.0, 0)
    listen(finished)
    return finished, scores


def _plan(examples: Examples, settings: Training, seed: int) -> list[list[list[int]]]:
    """Every optimiser step of the run as its batches, each a list of places: fixed by the seed beforehand.

    The batches are those of the first epoch; the later ones have them in another order.
    """
    generator = np.random.default_rng(seed)
    whole = epoch(examples.lengths, settings.batch_tokens, generator)
    batches: list[list[int]] = []
    for number in range(math.ceil(settings.epochs)):
        if number:
            whole = [whole[place] for place in generator.permutation(len(whole))]
        share = min(1.0, settings.epochs - number)
        batches += whole[: math.ceil(share * len(whole))]
    return [batches[start : start + settings.accumulate] for start in range(0, len(batches), settings.accumulate)]


def _validation_steps(steps: int, settings: Training) -> set[int]:
    count = max(1, round(settings.evaluations * settings.epochs))
    return {math.ceil(steps * k / count) for k in range(1, count + 1)}


def _accumulate(task: Task, batches: list[Batch], prefix: Prefix) -> float:
    """Adds the gradients of the mean loss over the batches together; gives that mean."""
    units = sum(batch.units for batch in batches)
    total = 0.0
    for batch in batches:
        with prefix.standing_in(batch.indices):
            total += task.backward(batch, units)
    return total


class _Kept:
    """The weights to keep: a copy of the best so far, or none where the last ones are kept."""

    def __init__(self, keep: Literal["best", "last"]) -> None:
        self._keep = keep
        self._weights: dict[str, Tensor] = {}
        self._best: tuple[int, Scores] | None = None
        self._highest: tuple[float, ...] | None = None
        self.stale = 0
        """Offers in a row that were no better than one before."""

    def offer(self, step: int, scores: Scores, parameters: dict[str, nn.Parameter]) -> None:
        """Takes the current weights if they are better."""
        better = self._highest is None or scores.rank > self._highest
        self._highest, self.stale = (scores.rank, 0) if better else (self._highest, self.stale + 1)
        if self._keep == "last" or better:
            self._best = (step, scores)
            if self._keep == "best":
                self._weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def restore(self, parameters: dict[str, nn.Parameter]) -> tuple[int, Scores]:
        """Puts the kept weights back; gives the step they are from and their scores."""
        for name, weight in self._weights.items():
            parameters[name].copy_(weight)
        assert self._best is not None  # the last step is always scored
        return self._best


def _diverged(step: int, loss: float, parameters: dict[str, nn.Parameter], split: str = "") -> DivergedError:
    bad = next((n for n, p in parameters.items() if p.grad is not None and not torch.isfinite(p.grad).all()), None)
    where = f"; the first bad gradient is that of {bad}" if bad else ""
    return DivergedError(
        f"training stopped at step {step}: the loss{split} is {loss:.4g}{where}",
        "lower the learning rate, or use --precision fp32; the weights before this step were finite",
    )
