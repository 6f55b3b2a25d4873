"""Full fine-tuning: every parameter of the base trains. What all other methods are measured against."""

from dataclasses import dataclass
from typing import ClassVar

from deltatune.methods.contract import CONFIG, Kind


@dataclass(frozen=True, slots=True)
class Full:
    """Trains every parameter of the base."""

    name: ClassVar[str] = "full"
    title: ClassVar[str] = "Full fine-tuning"
    kind: ClassVar[Kind] = "selection"
    paper: ClassVar[str] = ""
    learning_rate: ClassVar[float] = 1e-4
    peft_type: ClassVar[str] = "DELTATUNE_FULL"
    __pydantic_config__ = CONFIG

    def selects(self, parameter: str) -> bool:
        """Every parameter."""
        return True
