"""An experiment: which methods, on which base and data, with which seeds and settings."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deltatune.comparing.search import Range, Setting, Space
from deltatune.errors import UserError, nearest, unknown
from deltatune.methods import Method, make, options_of, parse
from deltatune.models.quantise import read_storages
from deltatune.training.generation import Decoding
from deltatune.training.settings import Training

_STRICT = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
_EXAMPLE = "an experiment is a mapping, such as  methods: [full, lora]"

_OWN: tuple[str, ...] = ("learning_rate", "storage")
"""What a method of an experiment has besides its hyperparameters, and words for a method may name among them."""

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Limit = Annotated[int, Field(ge=1)]


class DataChoice(BaseModel):
    """Which data, and how much of it. A plain name stands for the whole of it."""

    model_config = _STRICT

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

    model_config = _STRICT

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


class Cell(BaseModel):
    """One run of an experiment, whole in itself: what spec.json holds."""

    model_config = _STRICT

    base: str
    base_revision: str = ""
    data: DataChoice
    data_revision: str = ""
    method: MethodChoice
    training: Training
    decoding: Decoding = Decoding()
    new_tokens: tuple[str, ...] = ()
    seed: Seed

    @property
    def id(self) -> str:
        """Its folder's name: label, seed and a digest of everything that decides the result."""
        return f"{self._slug}-seed{self.seed}-{self._digest}"

    @property
    def place(self) -> str:
        """Its folder within the run's."""
        return f"cells/{self.id}"

    @property
    def _slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.method.label.lower()).strip("-")[:40] or self.method.method

    @property
    def _digest(self) -> str:
        spec = json.dumps(self.model_dump(mode="json", exclude={"method": {"search"}}), sort_keys=True)
        return hashlib.sha256(spec.encode()).hexdigest()[:8]


class TrialCell(Cell):
    """One trial of a search: trained like a cell, scored on the validation split, with no test split to read."""

    trial: int

    @property
    def id(self) -> str:
        """Its folder's name: label, number and a digest of everything that decides the result."""
        return f"{self._slug}-trial{self.trial}-{self._digest}"

    @property
    def place(self) -> str:
        """Its folder within the run's."""
        return f"trials/{self.id}"


class Match(BaseModel):
    """What every method is given as much of as one of them has. A plain word stands for the first method's."""

    model_config = _STRICT

    by: Literal["parameters", "bytes"]
    """parameters: those that the method trains beside the head; bytes: what an adapter file holds of them."""
    to: str = ""
    """The label of the method whose size the others take; left out, the first."""

    @model_validator(mode="before")
    @classmethod
    def _plain_word(cls, value: Any) -> Any:
        return {"by": value} if isinstance(value, str) else value


class Tuning(BaseModel):
    """A search for the settings of every method before it is compared: as many trials for each, on validation."""

    model_config = _STRICT

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


class Experiment(BaseModel):
    """What `deltatune compare` runs: every method with every seed, after a search for its settings if that is asked."""

    model_config = _STRICT

    base: str = "minilm"
    """Embedded name, local folder in Transformers' layout, or hub id with an optional @revision."""
    data: DataChoice = DataChoice(name="rotten-tomatoes")
    """A name, or a mapping with columns and limits."""
    methods: tuple[MethodChoice, ...] = Field(default_factory=lambda: _methods("full", "head", "lora"), min_length=1)
    """Names, names with options (`lora:rank=4`), or mappings with a label or learning rate of their own."""
    seeds: tuple[Seed, ...] = Field((0,), min_length=1)
    """Each method runs once with every seed."""
    training: Training = Training()
    """Settings that all methods share."""
    decoding: Decoding = Decoding()
    """How a language model writes its answers to the test prompts."""
    new_tokens: tuple[str, ...] = ()
    """Texts that become tokens of a language model, such as <tool>; their vectors train beside every method."""
    tuning: Tuning | None = None
    """A search for each method's settings, such as {trials: 8}; left out, every method runs with what it has."""
    match: Match | None = None
    """Sizes (rank, virtual tokens …) that make methods alike in one respect, such as parameters."""

    @field_validator("methods")
    @classmethod
    def _told_apart(cls, methods: tuple[MethodChoice, ...]) -> tuple[MethodChoice, ...]:
        labels = [choice.label for choice in methods]
        for label in labels:
            if labels.count(label) > 1:
                raise UserError(f"two methods are called '{label}'", "give one of them another label, or leave it out")
        return methods

    @field_validator("seeds")
    @classmethod
    def _once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(seeds))

    @model_validator(mode="after")
    def _matched(self) -> Self:
        labels = [choice.label for choice in self.methods]
        if self.match and self.match.to and self.match.to not in labels:
            raise unknown("method among the experiment's", self.match.to, labels)
        return self

    @model_validator(mode="after")
    def _searched(self) -> Self:
        if self.tuning is None:
            for choice in self.methods:
                if choice.search:
                    raise UserError(
                        f"{choice.label} says what to search, and the experiment has no search",
                        "add  tuning: {trials: 8}",
                    )
        elif self.tuning.seed in self.seeds:
            raise UserError(
                f"the search's seed {self.tuning.seed} is one of the experiment's",
                "choose another: what is chosen for a seed does better with it than it will with others",
            )
        return self

    def cells(self, base: str = "", base_revision: str = "", data_revision: str = "") -> list[Cell]:
        """Every run, the largest size first and then seed by seed: one that is cut short has whole rounds."""
        return [
            Cell(**self.common(choice, base, base_revision, data_revision, size), seed=seed)
            for size in self.data.sizes
            for seed in self.seeds
            for choice in self.methods
        ]

    def common(
        self, choice: MethodChoice, base: str, base_revision: str, data_revision: str, size: int | None
    ) -> dict[str, Any]:
        """The fields of a cell but for its seed."""
        return {
            "base": base or self.base,
            "base_revision": base_revision,
            "data": self.data.model_copy(update={"train": size}),
            "data_revision": data_revision,
            "method": choice.model_copy(update={"search": {}}),
            "training": self.training.model_copy(update={"learning_rate": self.rate(choice)}),
            "decoding": self.decoding,
            "new_tokens": self.new_tokens,
        }

    def rate(self, choice: MethodChoice) -> float:
        """The peak learning rate of a method: its own here, the experiment's, or the method's default."""
        return choice.learning_rate or self.training.learning_rate or choice.make().learning_rate


def read_experiment(path: Path | str | None, changes: Mapping[str, Any] | None = None) -> Experiment:
    """The experiment of a file, or the default one, with `changes` in place of what it says.

    In `data` and `training` single keys are changed. Raises `UserError` that names a wrong key or value.
    """
    content, defaults = _read_yaml(Path(path)) if path else {}, Experiment().model_dump(mode="json")
    for key, value in (changes or {}).items():
        old = content.get(key, defaults.get(key))
        if isinstance(value, Mapping) and isinstance(old, str):
            old = {"name": old}
        content[key] = {**old, **value} if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return make_experiment(content, str(path or "the experiment"))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"could not read {path}: {reason}", "give a YAML file, or flags alone") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(f"{path} is no valid YAML{where}: {problem}", _EXAMPLE) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no experiment", _EXAMPLE)
    return content


def make_experiment(content: Mapping[str, Any], source: str = "the experiment") -> Experiment:
    """Checks what a file or a program says. Raises `UserError` that names the wrong key or value."""
    content = {key: value for key, value in content.items() if key != "resolved"}  # as in a run's experiment.yaml
    try:
        return Experiment.model_validate(content)
    except ValidationError as error:
        raise _readable(error, source) from error


def _readable(error: ValidationError, source: str) -> UserError:
    every = error.errors()
    first = next(
        (one for one in every if one["type"] == "extra_forbidden"), every[0]
    )  # a typo may leave others missing
    place, name = ".".join(map(str, first["loc"])), str(first["loc"][-1])
    part = _PARTS.get(first["loc"][0], Experiment) if len(first["loc"]) > 1 else Experiment
    if first["type"] == "extra_forbidden":
        return UserError(
            f"{source}: there is no setting '{place}'", f"nearest: {', '.join(nearest(name, part.model_fields))}"
        )
    known = part.model_fields.get(name) or Experiment.model_fields.get(str(first["loc"][0]))
    hint = f"{place}: {known.description}" if known else ""
    if first["type"] == "missing":
        return UserError(f"{source}: {place} is missing", hint)
    wanted = _WANTED.get(first["type"]) or re.sub(r"^Input |, (unable|got) .*", "", first["msg"])
    return UserError(f"{source}: {place} {wanted}, not {first['input']!r}", hint)


_PARTS: Mapping[Any, type[BaseModel]] = {
    "data": DataChoice,
    "methods": MethodChoice,
    "training": Training,
    "decoding": Decoding,
    "tuning": Tuning,
    "match": Match,
}
_WANTED = {
    "tuple_type": "should be a list",
    "too_short": "should have one entry at least",
    "model_type": "should be a mapping",
    "dict_type": "should be a mapping",
    "invalid_key": "should be a word",
}
"""What pydantic would say in Python's words."""


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


def _methods(*names: str) -> tuple[MethodChoice, ...]:
    return tuple(MethodChoice.model_validate(name) for name in names)
