"""No training: a language model as it is. What a trained one has to be better than."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from deltatune.methods.contract import CONFIG, BaseParameter, Kind


@dataclass(frozen=True, slots=True)
class NoTraining:
    """Trains nothing: a language model is taken as it is. A classifier's head trains all the same."""

    name: ClassVar[str] = "none"
    title: ClassVar[str] = "No training"
    kind: ClassVar[Kind] = "selection"
    paper: ClassVar[str] = ""
    learning_rate: ClassVar[float] = 1e-2
    peft_type: ClassVar[str] = "DELTATUNE_NONE"
    __pydantic_config__ = CONFIG

    def select(self, parameters: Sequence[BaseParameter]) -> Collection[BaseParameter]:
        """None of them."""
        return ()
