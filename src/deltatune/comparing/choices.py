"""What an experiment may say: of its data, its methods, and how these are made alike."""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from deltatune.comparing.search import Range, Setting, Space
from deltatune.methods import Method, make, options_of, parse
from deltatune.models.quantise import read_storages

STRICT = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

_OWN: tuple[str, ...] = ("learning_rate", "storage")
"""What a method of an experiment has besides its hyperparameters, and words for a method may name among them."""

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Limit = Annotated[int, Field(ge=1)]


class DataChoice(BaseModel):
    """Which data, and how much of it. A plain name stands for the whole of it."""

    model_config = STRICT

    name: str
    """Embedded name, file, folder or hub id."""
    task: Literal["", "classification", "generation"] = ""
    """What it is for, where its columns do not say it."""
    text: tuple[str, ...] = ()
    """Text column, the two of a sentence pair, or the prompt's; found by name where left out."""
    label: str = ""
    """Label column, or the completion's; found by name where left out."""
    template: str = ""
    """Words around columns that make the prompt, such as "Summarise: {document}"."""
    system: str = ""
    """What the system says before each prompt."""
    train: Limit | Annotated[tuple[Limit, ...], Field(min_length=1)] | None = None
    """Most training examples to use. Several, such as [200, 800, 3200], run every method with each: learning curves.
    The smaller ones are parts of the larger."""
    validation: int | None = Field(None, ge=1)
    """Most validation examples to use."""
    test: int | None = Field(None, ge=1)
    """Most test examples to use."""

    @model_validator(mode="before")
    @classmethod
    def _plain_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("train")
    @classmethod
    def _ascending(cls, train: int | tuple[int, ...] | None) -> int | tuple[int, ...] | None:
        return tuple(sorted(set(train))) if isinstance(train, tuple) else train

    @property
    def sizes(self) -> tuple[int | None, ...]:
        """The numbers of training examples to run with, the largest first; None is all of them."""
        return self.train[::-1] if isinstance(self.train, tuple) else (self.train,)


class MethodChoice(BaseModel):
    """A method with its hyperparameters. In a file: `lora`, `lora:rank=8`, or a mapping with these keys."""

    model_config = STRICT

    method: str
    """Its name, as `deltatune methods` lists it."""
    options: dict[str, Any] = {}
    """Its hyperparameters, such as rank: 8."""
    label: str = ""
    """What tables and plots call it; made from the name and the options where left out."""
    learning_rate: float | None = Field(None, gt=0)
    """Its own peak learning rate, in place of the experiment's."""
    storage: dict[str, str] = {}
    """How the base's linear layers are stored, such as nf4, or by target: {mlp: nf4, attention: int8}."""
    search: Space = {}
    """What a search tries besides the learning rate: {rank: [4, 8, 16]}, or a range {dropout: {low: 0, high: 0.3}}.
    With `learning_rate` here, that takes the place of its usual range."""

    @model_validator(mode="before")
    @classmethod
    def _written_out(cls, value: Any) -> Any:
        """Words become fields, and every hyperparameter that was left out gets its value."""
        if isinstance(value, str):
            name, options = parse(value)
            first = options.get(name.partition("+")[0], {}) if "+" in name else options  # a mix has its first one's
            own = {key: first.pop(key) for key in _OWN if key in first}
            value = {"method": name, **own, "options": options}
        if not (isinstance(value, Mapping) and isinstance(value.get("method"), str)):
            return value
        name, options = value["method"], value.get("options") or {}
        if not isinstance(options, Mapping):
            return value
        own = {key: value[key] for key in _OWN if value.get(key)}
        label = value.get("label") or _label(name, {**options, **own})
        storage = read_storages(value.get("storage") or "")
        return {**value, "label": label, "options": options_of(make(name, options)), "storage": storage}

    @model_validator(mode="after")
    def _searchable(self) -> Self:
        for name, values in self.search.items():
            for value in (values.low, values.high) if isinstance(values, Range) else values:
                chosen = self.with_settings({name: value})
                chosen.make()
        return self

    def make(self) -> Method:
        """The method itself."""
        return make(self.method, self.options)

    def resized(self, size: str, value: int) -> "MethodChoice":
        """The method with this value of the hyperparameter that makes it larger or smaller; its label says so.

        A scale that follows from the rank (`alpha`, unless it is given) goes with it.
        """
        label = re.sub(rf"\b{size}=\d+", f"{size}={value}", self.label)
        return MethodChoice.model_validate(
            {**self.model_dump(), "options": {**self.options, size: value}, "label": label}
        )

    def with_settings(self, settings: Mapping[str, Setting]) -> "MethodChoice":
        """The method with these settings, as a search names them, and nothing left to search."""
        options = {**self.options, **{name: value for name, value in settings.items() if name != "learning_rate"}}
        rate = settings.get("learning_rate", self.learning_rate)
        fields = {**self.model_dump(exclude={"search"}), "options": options, "learning_rate": rate}
        return MethodChoice.model_validate(fields)


By = Literal["parameters", "bytes", "memory", "time"]


class Match(BaseModel):
    """What every method is given as much of as one of them has. A plain word stands for the first method's."""

    model_config = STRICT

    by: By
    """parameters: those that the method trains beside the head; bytes: what an adapter file holds of them; memory: the
    planned peak of its run; time: the planned seconds of its steps."""
    to: str = ""
    """The label of the method whose size the others take; left out, the first."""

    @model_validator(mode="before")
    @classmethod
    def _plain_word(cls, value: Any) -> Any:
        return {"by": value} if isinstance(value, str) else value


class Tuning(BaseModel):
    """A search for the settings of every method before it is compared: as many trials for each, on validation."""

    model_config = STRICT

    trials: int = Field(ge=1)
    """Runs for each method, each as long as a run of the experiment. The first has the settings of no search."""
    seed: Seed = 1000
    """Decides the trials' order of examples and first values, and what is tried; none of the experiment's seeds."""
    span: float = Field(10.0, gt=1)
    """Learning rates are searched from the method's own divided by this to it multiplied by this."""

    @model_validator(mode="before")
    @classmethod
    def _plain_number(cls, value: Any) -> Any:
        return {"trials": value} if isinstance(value, int) else value


def _label(name: str, options: Mapping[str, Any]) -> str:
    if "+" in name:
        options = dict(_dotted(options))
    shown = ", ".join(f"{key}={_short(value)}" for key, value in options.items())
    return f"{name} ({shown})" if shown else name


def _dotted(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The options of a mix, {"lora": {"rank": 8}}, as {"lora.rank": 8}."""
    for key, value in options.items():
        if isinstance(value, Mapping) and "." not in key:
            yield from ((f"{key}.{option}", chosen) for option, chosen in value.items())
        else:
            yield key, value


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        value = [f"{key}:{one}" for key, one in value.items()]
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
