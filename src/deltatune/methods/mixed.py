"""Several methods as one adapter: `lora+norms`, `lora:rank=8+bitfit`, in a program `Mixed(LoRA(rank=8), BitFit())`.

Each part is put on the model, counted and trained as it would be alone; together they have one name, one head and one
folder. There is one learning rate, the first part's. The parameters of another part train at it times the ratio of the
two methods' own rates, since what suits one way of writing a change does not suit another: Hayou et al. 2024, arXiv
2402.12354, for the two matrices of LoRA alone. The head trains at the rate itself.

Refused is what means nothing: a method twice; `full`, beside which nothing is left to add, and `head`, which is in
every adapter; two methods over the same layer, or a selection of a weight that another part adapts or selects.

PEFT has one method to a folder, so it does not read these: train the parts as adapters of their own to give them to it.
"""

from dataclasses import dataclass
from typing import ClassVar

from deltatune.errors import UserError
from deltatune.methods.contract import Kind, Method
from deltatune.methods.full import Full
from deltatune.methods.head import Head
from deltatune.methods.none import NoTraining


@dataclass(frozen=True, init=False)
class Mixed(Method):
    """Trains what several methods train, as one adapter."""

    parts: tuple[Method, ...]
    """The methods, the main one first."""

    kind: ClassVar[Kind] = "mixed"
    peft_type: ClassVar[str] = "DELTATUNE_MIXED"

    def __init__(self, *parts: Method) -> None:
        """Raises `UserError` for fewer than two methods, one of them twice, and those that go with nothing."""
        names = [part.name for part in parts]
        if len(parts) < 2:
            raise UserError("a mix needs two methods at least", "write them with a +, such as lora+norms")
        for part in parts:
            if names.count(part.name) > 1:
                raise UserError(f"{self._join(names)}: {part.name} is there twice", "give its options once")
            if isinstance(part, Full | Head | NoTraining | Mixed):
                raise UserError(f"{self._join(names)}: {part.name} goes with nothing else", _ALONE[type(part)])
        object.__setattr__(self, "parts", parts)

    @property
    def name(self) -> str:  # type: ignore[override]
        """The parts' names, as on the command line."""
        return self._join([part.name for part in self.parts])

    @property
    def title(self) -> str:  # type: ignore[override]
        """The parts' titles."""
        return " + ".join(part.title for part in self.parts)

    @property
    def paper(self) -> str:  # type: ignore[override]
        """The parts' papers."""
        return ", ".join(part.paper for part in self.parts if part.paper)

    @property
    def learning_rate(self) -> float:  # type: ignore[override]
        """The first part's."""
        return self.parts[0].learning_rate

    @property
    def virtual_tokens(self) -> int:
        """Positions that the parts take from the model's."""
        return sum(getattr(part, "virtual_tokens", 0) for part in self.parts)

    @staticmethod
    def _join(names: list[str]) -> str:
        return "+".join(names)


_ALONE: dict[type, str] = {
    Full: "it trains everything already",
    Head: "the head trains with every method: leave it out",
    NoTraining: "it trains nothing: leave it out",
    Mixed: "write all the methods side by side",
}
