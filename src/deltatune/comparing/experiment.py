"""An experiment: which methods, on which base and data, with which seeds and settings."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from deltatune.comparing.choices import STRICT, DataChoice, Match, MethodChoice, Seed, Tuning
from deltatune.errors import UserError, nearest, unknown
from deltatune.training.generation import Decoding
from deltatune.training.settings import Training

_EXAMPLE = "an experiment is a mapping, such as  methods: [full, lora]"


class Cell(BaseModel):
    """One run of an experiment, whole in itself: what spec.json holds."""

    model_config = STRICT

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


class Experiment(BaseModel):
    """What `deltatune compare` runs: every method with every seed, after a search for its settings if that is asked."""

    model_config = STRICT

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
    where = [part for part in first["loc"] if not _ALTERNATIVE.search(str(part))]
    place, name = ".".join(map(str, where)), str(where[-1])
    part = _PARTS.get(first["loc"][0], Experiment) if len(first["loc"]) > 1 else Experiment
    if first["type"] == "extra_forbidden":
        return UserError(
            f"{source}: there is no setting '{place}'", f"nearest: {', '.join(nearest(name, part.model_fields))}"
        )
    known = part.model_fields.get(name) or Experiment.model_fields.get(str(first["loc"][0]))
    hint = f"{place}: {' '.join((known.description or '').split())}" if known else ""
    if first["type"] == "missing":
        return UserError(f"{source}: {place} is missing", hint)
    wanted = _WANTED.get(first["type"]) or re.sub(r"^Input |, (unable|got) .*", "", first["msg"])
    return UserError(f"{source}: {place} {wanted}, not {first['input']!r}", hint)


_ALTERNATIVE = re.compile(r"constrained-|\[")
"""What pydantic adds to a place that may hold one thing or another: which of them it tried."""
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


def _methods(*names: str) -> tuple[MethodChoice, ...]:
    return tuple(MethodChoice.model_validate(name) for name in names)
