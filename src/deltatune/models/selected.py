"""A selection on a model: parameters of the base that train."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from deltatune.errors import UserError
from deltatune.methods import Selection
from deltatune.models.adapted import base_parameters, quantised_layers
from deltatune.models.part import Part
from deltatune.models.targets import below


@dataclass(frozen=True, eq=False)
class Selected(Part):
    """The base's own parameters that a selection names, outside of the head."""

    method: Selection
    parameters: Mapping[str, nn.Parameter]
    """By their names in the base."""
    trains_base: bool = True

    def __str__(self) -> str:
        return f"{self.method.name}: selects parameters of the base"

    def trained(self) -> list[nn.Parameter]:
        """The selected parameters."""
        return list(self.parameters.values())

    def switch(self, on: bool) -> None:
        """Does nothing: what it trained is the base."""

    def remove(self, model: nn.Module) -> None:
        """Raises `UserError`: what it trained is the base."""
        raise UserError(f"{self.method.name} trained the base's own parameters", "load the base again to be rid of it")

    def stored(self) -> dict[str, Tensor]:
        """The selected parameters by name."""
        return dict(self.parameters)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies the tensors over the base's."""
        for name, tensor in tensors.items():
            self.parameters[name].copy_(tensor)


def put_selection(model: nn.Module, method: Selection, head: tuple[str, ...]) -> Selected:
    """Finds what `method` selects of the model's base, outside of `head`."""
    _refuse_quantised(model, method)
    every = base_parameters(model).items()
    chosen = {name: parameter for name, parameter in every if not below(name, head) and method.selects(name)}
    return Selected(method, chosen)


def _refuse_quantised(model: nn.Module, method: Selection) -> None:
    """A weight that is stored in codes cannot train."""
    for path, layer in quantised_layers(model).items():
        if method.selects(f"{path}.weight"):
            raise UserError(
                f"{method.name} trains {path}.weight, which is stored as {layer.storage} and stays as it is",
                "load the base without a storage, or use a method that adds to frozen weights, such as lora",
            )
