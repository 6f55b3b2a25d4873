"""What a method is: a frozen dataclass of hyperparameters that can say, without any weights, what it adds and costs.

Two kinds stand here, each a small Protocol. A method fills one of them in one file of its own; registering it
(see `registry.py`) makes it appear on the command line, in comparisons, in the docs and in the conformance tests.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import ConfigDict
from torch import Tensor, nn

from deltatune.weights import FrozenWeight

Kind = Literal["weight delta", "selection"]

Targets = str | tuple[str, ...]
"""Which linear layers a method adapts: aliases, module names or regular expressions; one, or several."""

CONFIG = ConfigDict(extra="forbid", use_attribute_docstrings=True)
"""How pydantic reads a method's fields from a command line or a file: unknown names refused, docstrings as help."""


@runtime_checkable
class Method(Protocol):
    """What every method says of itself."""

    name: ClassVar[str]
    """Its name on the command line and in files."""
    title: ClassVar[str]
    """Its name as the field writes it."""
    kind: ClassVar[Kind]
    paper: ClassVar[str]
    """arXiv id or other source; empty where there is none to name."""
    learning_rate: ClassVar[float]
    """A rate that works on small encoders: where to begin, not a result of tuning."""
    peft_type: ClassVar[str]
    """The type in adapter_config.json: PEFT's own, or `DELTATUNE_…` where PEFT has no such method."""


@runtime_checkable
class Delta(Protocol):
    """The trained module over one frozen weight. A real one is also an `nn.Module`."""

    def merged(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The plain formula: the one weight that gives the adapted output."""

    def __call__(
        self, x: Float[Tensor, "tokens in"], weight: FrozenWeight, bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "tokens out"]:
        """The fast formula: the same output, without forming the merged weight."""


@runtime_checkable
class WeightDelta(Method, Protocol):
    """A method that adds a module over each frozen linear weight it targets."""

    targets: Targets
    patterns: ClassVar[Mapping[str, str]]
    """Fields that hold values for single targets → the field that such a value replaces."""
    file_keys: ClassVar[Mapping[str, str]]
    """Key suffix in adapter files → attribute of the delta module."""
    unmergeable: ClassVar[str]
    """Why it cannot be merged into the weight; empty where it can."""

    def check(self, out: int, in_: int) -> None:
        """Raises `UserError` where the hyperparameters do not fit an (out, in) weight."""

    def parameters(self, out: int, in_: int) -> int:
        """Trained parameters on one (out, in) weight."""

    def kept_for_backward(self, out: int, in_: int, tokens: int, itemsize: int) -> int:
        """Bytes that one adapted weight keeps from forward to backward, its input included, in `itemsize` numbers."""

    def delta(self, out: int, in_: int, generator: torch.Generator) -> nn.Module:
        """A fresh module for one (out, in) weight; it fulfils `Delta`."""

    def to_peft(self, modules: Mapping[str, Any]) -> dict[str, Any]:
        """The method's fields of adapter_config.json; `modules` has the hyperparameters of each adapted path."""

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "WeightDelta":
        """The method that an adapter_config.json describes; raises `UserError` on what we cannot honour."""


@runtime_checkable
class Selection(Method, Protocol):
    """A method that adds nothing: it names parameters of the base that train."""

    def selects(self, parameter: str) -> bool:
        """Whether the parameter of that name trains. The classification head always does."""
