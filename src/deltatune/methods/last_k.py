"""Last-k: the top k blocks train. The backward pass ends below them, and what enters them can be kept (`cache`).

Lee, Tang and Lin 2019, arXiv 1911.03090: with the last fourth of the layers BERT and RoBERTa reach 90 % of the quality.
The top blocks of an encoder–decoder are its decoder's; a larger k goes on with its encoder's. What stands above the
blocks, such as a last norm or a pooler that the base brings, stays frozen; the head trains.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from deltatune.errors import UserError
from deltatune.methods.contract import CONFIG, BaseParameter, Kind
from deltatune.methods.values import at_least_one


@dataclass(frozen=True, slots=True)
class LastK:
    """Trains the top k blocks."""

    k: int = 2
    """How many."""

    name: ClassVar[str] = "last-k"
    title: ClassVar[str] = "Last-k"
    kind: ClassVar[Kind] = "selection"
    paper: ClassVar[str] = "arXiv 1911.03090"
    learning_rate: ClassVar[float] = 3e-4
    grows_by: ClassVar[str] = "k"
    peft_type: ClassVar[str] = "DELTATUNE_LAST_K"
    __pydantic_config__ = CONFIG

    def __post_init__(self) -> None:
        at_least_one(self.name, k=self.k)

    def select(self, parameters: Sequence[BaseParameter]) -> Collection[BaseParameter]:
        """What the top k blocks hold. Raises `UserError` for more than there are, with their number."""
        count = 1 + max((parameter.block for parameter in parameters if parameter.block is not None), default=-1)
        if self.k > count:
            raise UserError(f"{self.name}: k is {self.k}, and this base has {count} blocks", "give at most as many")
        return [p for p in parameters if p.block is not None and p.block >= count - self.k]
