"""Searching each method's settings with the same budget: the trials of one method as a lane of cells.

Optuna's TPE (arXiv 2304.11127) proposes them. A trial is proposed from the results of those before it and a seed alone,
so that a search which was cut short goes on with the very trial that it would have had.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltatune.comparing.choices import MethodChoice, Tuning
from deltatune.comparing.experiment import Experiment, TrialCell
from deltatune.comparing.results import FailedCell, Trained
from deltatune.comparing.search import Range, Search, Setting, Space, Trial
from deltatune.comparing.sharing import Result
from deltatune.data import DialogueData, TextData
from deltatune.models.places import Place

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

_RANDOM = 4
"""Trials before the proposals follow from results."""


@dataclass(frozen=True)
class Where:
    """The base and data of all trials, found."""

    base: Place
    data: TextData | DialogueData


class SearchLane:
    """The trials of one method, one after the other."""

    def __init__(self, experiment: Experiment, choice: MethodChoice, where: Where) -> None:
        assert experiment.tuning is not None
        self._experiment, self._choice, self._where = experiment, choice, where
        self.search = Search(
            label=choice.label,
            method=choice.method,
            space=space_of(experiment, choice),
            budget=1 if _trains_nothing(choice, where.data) else experiment.tuning.trials,
            seed=experiment.tuning.seed,
        )
        self._next: TrialCell | None = None

    def next(self) -> TrialCell | None:
        """The next trial; None where the budget is spent."""
        if self._next is None and not self.search.done:
            self._next = self._cell(len(self.search.trials))
        return self._next

    def take(self, result: Result) -> None:
        """Adds what came out of the trial to the search."""
        assert self._next is not None
        assert isinstance(result, Trained | FailedCell)
        trial = _trial(self._next, self._settings, result)
        metric = self.search.metric or (result.metric if isinstance(result, Trained) else "")
        self.search = self.search.model_copy(update={"trials": (*self.search.trials, trial), "metric": metric})
        self._next = None

    def chosen(self) -> MethodChoice | None:
        """The method with the best settings; None where no trial finished."""
        best = self.search.chosen
        return None if best is None else self._choice.with_settings(best.settings)

    def _cell(self, number: int) -> TrialCell:
        self._settings = propose(self.search, self._start()) if number else self._start()
        common = self._experiment.common(
            self._choice.with_settings(self._settings),
            self._where.base.id,
            self._where.base.revision,
            self._where.data.revision,
            self._experiment.data.sizes[0],
        )
        return TrialCell(**common, seed=self.search.seed, trial=number)

    def _start(self) -> dict[str, Setting]:
        """The settings that the experiment has without a search, or the nearest that the space holds."""
        own = {**self._choice.options, "learning_rate": self._experiment.rate(self._choice)}
        return {name: _within(values, own.get(name)) for name, values in self.search.space.items()}


def space_of(experiment: Experiment, choice: MethodChoice) -> Space:
    """What is searched for a method: its learning rate, around the one that it has, and what it names itself."""
    tuning, rate = experiment.tuning or Tuning(trials=1), experiment.rate(choice)
    return {"learning_rate": Range(low=rate / tuning.span, high=rate * tuning.span, log=True), **choice.search}


def propose(search: Search, start: Mapping[str, Setting]) -> dict[str, Setting]:
    """The settings of the next trial, from those before it: by lot at first, then where good ones were found.

    A trial that failed counts as worse than any that did not.
    """
    import optuna

    optuna.logging.set_verbosity(logging.WARNING)
    spaces = {name: _distribution(values) for name, values in search.space.items()}
    sampler = optuna.samplers.TPESampler(n_startup_trials=_RANDOM, seed=search.seed + len(search.trials))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for trial in search.trials:
        study.add_trial(_told(trial, spaces))
    proposed: dict[str, Setting] = study.ask(spaces).params
    return proposed


def _told(trial: Trial, spaces: "dict[str, BaseDistribution]") -> "FrozenTrial":
    from optuna.trial import TrialState, create_trial

    if trial.value is None:  # TPE has those that were pruned below the finished ones
        return create_trial(state=TrialState.PRUNED, params=trial.settings, distributions=spaces)
    return create_trial(value=trial.value, params=trial.settings, distributions=spaces)


def _distribution(values: "Range | tuple[Setting, ...]") -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if isinstance(values, Range):
        return FloatDistribution(values.low, values.high, log=values.log)
    return CategoricalDistribution(values)


def _within(values: "Range | tuple[Setting, ...]", own: object) -> Setting:
    if isinstance(values, Range):
        return min(max(float(own), values.low), values.high) if isinstance(own, int | float) else values.low
    return next((value for value in values if value == own), values[0])


def _trial(cell: TrialCell, settings: dict[str, Setting], result: Trained | FailedCell) -> Trial:
    if isinstance(result, FailedCell):
        return Trial(number=cell.trial, settings=settings, status="failed", cell=cell.id, reason=result.reason)
    measured = result.model_dump(
        include={"value", "validation", "steps", "best_step", "train_seconds", "seconds", "reason"}
    )
    status = "failed" if result.value is None else "done"
    return Trial(number=cell.trial, settings=settings, status=status, cell=cell.id, **measured)


def _trains_nothing(choice: MethodChoice, data: TextData | DialogueData) -> bool:
    """Whether there is nothing to tune: a language model as it is. A classifier's head trains with every method."""
    return choice.method == "none" and data.task == "generation"
