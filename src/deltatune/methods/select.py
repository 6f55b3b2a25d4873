"""Any selection: the parameters of the base that words and regular expressions name.

An entry is a word for what parameters are (`embeddings`, `norms`, `biases`, a role such as `query`, an alias such as
`mlp`) or a regular expression for one or more whole parts of their names: `layer.[45]`, `attention.output`, `.*bias`.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from deltatune.errors import UserError
from deltatune.methods.choose import choose
from deltatune.methods.contract import CONFIG, BaseParameter, Kind, Targets


@dataclass(frozen=True, slots=True)
class Select:
    """Trains the parameters of the base that are named."""

    parameters: Targets = ()
    """Words or regular expressions; one, or several. There is no default."""
    exclude: Targets = ()
    """Which of them stay frozen, named in the same way."""

    name: ClassVar[str] = "select"
    title: ClassVar[str] = "Selection by name"
    kind: ClassVar[Kind] = "selection"
    paper: ClassVar[str] = ""
    learning_rate: ClassVar[float] = 3e-4
    peft_type: ClassVar[str] = "DELTATUNE_SELECT"
    __pydantic_config__ = CONFIG

    def select(self, parameters: Sequence[BaseParameter]) -> Collection[BaseParameter]:
        """Those that are named and not excluded. Raises `UserError` where none is left."""
        if not self.parameters:
            raise UserError(
                f"{self.name}: parameters is empty", "name some, such as parameters=norms or parameters='layer.[45]'"
            )
        chosen = choose(self.name, self.parameters, parameters)
        left = chosen - choose(self.name, self.exclude, [parameter for parameter in parameters if parameter in chosen])
        if not left:
            raise UserError(f"{self.name}: everything that is named is excluded again", "exclude less")
        return left
