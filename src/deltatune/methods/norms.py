"""LayerNorm tuning: the gains and shifts of the normalisations train.

Zhao et al. 2024, arXiv 2312.11420. In  γ ⊙ x̂ + β  both train, of every norm; an RMSNorm has γ alone. Norms are found by
the type of their module, whatever its name.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from deltatune.methods.choose import choose
from deltatune.methods.contract import CONFIG, BaseParameter, Kind


@dataclass(frozen=True, slots=True)
class Norms:
    """Trains γ and β of every normalisation."""

    name: ClassVar[str] = "norms"
    title: ClassVar[str] = "LayerNorm tuning"
    kind: ClassVar[Kind] = "selection"
    paper: ClassVar[str] = "arXiv 2312.11420"
    learning_rate: ClassVar[float] = 1e-2
    peft_type: ClassVar[str] = "DELTATUNE_NORMS"
    __pydantic_config__ = CONFIG

    def select(self, parameters: Sequence[BaseParameter]) -> Collection[BaseParameter]:
        """What the norms hold. Raises `UserError` for a base without any."""
        return choose(self.name, "norms", parameters)
