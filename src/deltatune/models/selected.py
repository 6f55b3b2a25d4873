"""A selection on a model: parameters of the base that train."""

from collections.abc import Mapping, Set
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from deltatune.errors import UserError
from deltatune.methods import BaseParameter, NoTraining, Selection
from deltatune.models.adapted import base_parameters, quantised_layers
from deltatune.models.blocks import stacks
from deltatune.models.part import Part
from deltatune.models.roles import ALIASES, Role, base_layers, linear_roles, survey
from deltatune.models.targets import below, within
from deltatune.weights import QuantisedLinear


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

    def claims(self) -> Set[str]:
        """The selected parameters."""
        return self.parameters.keys()

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
    """Finds what `method` selects of the model's base, outside of `head`.

    Raises `UserError` for stored codes, which cannot train, and where nothing at all would.
    """
    every, codes = _described(model)
    described = {seen: parameter for seen, parameter in every.items() if not below(seen.names[0], head)}
    chosen = set(method.select([*described, *codes]))
    if not (chosen or head or isinstance(method, NoTraining)):
        raise UserError(
            f"{method.name} trains nothing of this model: it has no head beside the base",
            "a language model's output layer is a part of it; use another method, such as lora, or none",
        )
    for seen in filter(chosen.__contains__, codes):
        raise UserError(
            f"{method.name} trains {seen.names[0]}, which is stored as {codes[seen].storage} and stays as it is",
            "load the base without a storage, or use a method that adds to frozen weights, such as lora",
        )
    return Selected(method, {seen.names[0]: described[seen] for seen in described if seen in chosen})


@survey
def _described(
    model: nn.Module,
) -> tuple[dict[BaseParameter, nn.Parameter], dict[BaseParameter, QuantisedLinear]]:
    """Each parameter of the base as selections see it, the head's, too; and each weight that is stored in codes."""
    own = list(base_parameters(model).values())
    names: dict[nn.Parameter, list[str]] = {parameter: [] for parameter in own}
    words: dict[nn.Parameter, set[str]] = {parameter: set() for parameter in own}
    roles = linear_roles(model)
    blocks = {block: number for number, block in enumerate(block for stack in stacks(model) for block in stack)}

    def block_of(path: str) -> int | None:
        return next((blocks[outer] for outer in within(path) if outer in blocks), None)

    for path, module in base_layers(model):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in names:
                names[parameter].append(f"{path}.{name}" if path else name)
                words[parameter] |= _words(module, name, roles.get(path, "other"), block_of(path) is not None)
    tokens = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    vocabulary = getattr(tokens, "weight", None)

    def seen(names: tuple[str, ...], words: set[str]) -> BaseParameter:
        return BaseParameter(names, frozenset(words), block_of(names[0]))

    described = {
        seen(tuple(names[parameter]), words[parameter] | ({"token-embedding"} if parameter is vocabulary else set())): (
            parameter
        )
        for parameter in own
    }
    codes = {
        seen((f"{path}.weight",), _words(layer, "weight", roles[path], block_of(path) is not None)): layer
        for path, layer in quantised_layers(model).items()
    }
    return described, codes


def _words(module: nn.Module, name: str, role: Role, in_block: bool) -> set[str]:
    """What a parameter directly in this module is; a table of position biases within a block is no embedding."""
    words = {alias for alias, roles in ALIASES.items() if role in roles} | ({role} - {"other"})
    if name == "bias" or name.endswith("_bias"):
        words.add("biases")
    if any(kind.__name__.rstrip("123d").endswith("Norm") for kind in type(module).__mro__):
        words.add("norms")
    if isinstance(module, nn.Embedding) and not in_block:
        words.add("embeddings")
    return words
