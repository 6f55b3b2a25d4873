"""BitFit: the biases of the base train, and nothing else of it.

Ben Zaken, Ravfogel and Goldberg 2022, arXiv 2106.10199. In  W x + b  the b train, of linear layers and of norms. The
paper's reduced variant trains those of the queries and of the layer that widens the MLP alone: `biases=[query, up]`.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from deltatune.methods.choose import choose
from deltatune.methods.contract import CONFIG, BaseParameter, Kind, Targets


@dataclass(frozen=True, slots=True)
class BitFit:
    """Trains the biases."""

    biases: Targets = "all"
    """Which: `all`, or those of roles (query, up, …), of `norms`, or of names by regular expressions."""

    name: ClassVar[str] = "bitfit"
    title: ClassVar[str] = "BitFit"
    kind: ClassVar[Kind] = "selection"
    paper: ClassVar[str] = "arXiv 2106.10199"
    learning_rate: ClassVar[float] = 5e-3
    peft_type: ClassVar[str] = "DELTATUNE_BITFIT"
    __pydantic_config__ = CONFIG

    def select(self, parameters: Sequence[BaseParameter]) -> Collection[BaseParameter]:
        """The biases, or some. Raises `UserError` for a base without any, as Llama's are."""
        biases = choose(self.name, "biases", parameters)
        if self.biases == "all":
            return biases
        return choose(self.name, self.biases, [parameter for parameter in parameters if parameter in biases])
