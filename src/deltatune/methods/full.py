"""Full fine-tuning: every parameter of the base trains. What all other methods are measured against."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from deltatune.methods.choose import choose
from deltatune.methods.contract import CONFIG, BaseParameter, Kind, Targets


@dataclass(frozen=True, slots=True)
class Full:
    """Trains every parameter of the base."""

    exclude: Targets = ()
    """What stays frozen: `embeddings`, `norms`, `biases`, roles, or regular expressions for whole parts of names."""

    name: ClassVar[str] = "full"
    title: ClassVar[str] = "Full fine-tuning"
    kind: ClassVar[Kind] = "selection"
    paper: ClassVar[str] = ""
    learning_rate: ClassVar[float] = 1e-4
    peft_type: ClassVar[str] = "DELTATUNE_FULL"
    __pydantic_config__ = CONFIG

    def select(self, parameters: Sequence[BaseParameter]) -> Collection[BaseParameter]:
        """Every parameter but the excluded."""
        return set(parameters) - choose(self.name, self.exclude, parameters)
