"""What one method put on a model: the same questions to every kind, so that attaching and saving know none of them."""

from collections.abc import Mapping, Set
from typing import Any, Protocol

from torch import Tensor, nn

from deltatune.methods import Method


class Part(Protocol):
    """One method of an adapter as it stands on a model. Its `str` says in words what it is on."""

    method: Method
    """With what examples suggested to it."""
    trains_base: bool = False
    """Whether it writes to the base's own parameters, so that nothing can stand beside the adapter."""

    def trained(self) -> list[nn.Parameter]:
        """The parameters that it trains."""

    def switch(self, on: bool) -> None:
        """Makes it act, or lets the model give what it would without it."""

    def remove(self, model: nn.Module) -> None:
        """Takes it off the model."""

    def claims(self) -> Set[str]:
        """Names of the base's parameters that it trains or stands over: no other part of the adapter may."""
        return frozenset()

    # How it trains.

    def rates(self) -> Mapping[nn.Parameter, float]:
        """The learning rates of parameters as multiples of the run's; 1 for one that is not named."""
        return {}

    def penalty(self) -> Tensor | None:
        """A term to add to the loss; None where there is none."""
        return None

    def after_step(self, step: int, steps: int) -> None:
        """Is called after each optimiser step, while the gradients still stand."""
        return

    def settled(self, step: int, steps: int) -> bool:
        """Whether what is trained has its final form after that step."""
        return True

    # Its file form.

    def stored(self) -> dict[str, Tensor]:
        """What an adapter file holds of it, by key; as PEFT's, one without a module path begins with `base_model.`."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over tensors as `stored` gave them. Their names and shapes have been checked."""

    def to_peft(self, model: nn.Module) -> dict[str, Any]:
        """Its fields of adapter_config.json."""
        return {}
