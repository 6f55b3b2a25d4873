"""The head alone: a linear probe on a frozen base. The honest floor that every other method has to beat.

Alain and Bengio 2016, arXiv 1610.01644.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from deltatune.methods.contract import CONFIG, BaseParameter, Kind


@dataclass(frozen=True, slots=True)
class Head:
    """Trains the classification head and nothing else."""

    name: ClassVar[str] = "head"
    title: ClassVar[str] = "Head only"
    kind: ClassVar[Kind] = "selection"
    paper: ClassVar[str] = "arXiv 1610.01644"
    learning_rate: ClassVar[float] = 1e-2
    peft_type: ClassVar[str] = "DELTATUNE_HEAD"
    __pydantic_config__ = CONFIG

    def select(self, parameters: Sequence[BaseParameter]) -> Collection[BaseParameter]:
        """None of the base; the head trains with every method."""
        return ()
