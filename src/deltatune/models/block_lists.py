"""The blocks of a model: the layers that are stacked, found as the lists of modules that hold linear layers."""

from torch import nn

from deltatune.models.roles import base_layers, linear_roles
from deltatune.models.targets import below


def stacks(model: nn.Module) -> list[list[str]]:
    """The paths of the model's blocks from the input on, a list for each stack: an encoder–decoder has two."""
    linear = linear_roles(model)
    found: list[list[str]] = []
    for path, module in base_layers(model):
        inside = any(below(path, blocks) for blocks in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            blocks = [f"{path}.{name}" for name, _ in module.named_children()]
            if all(any(below(layer, [block]) for layer in linear) for block in blocks):
                found.append(blocks)
    return found
