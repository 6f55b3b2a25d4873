"""The blocks of a model: the layers that are stacked, found as the lists of modules that hold linear layers."""

from torch import nn

from deltatune.models.roles import base_layers, linear_roles, survey
from deltatune.models.targets import within


@survey
def stacks(model: nn.Module) -> list[list[str]]:
    """The paths of the model's blocks from the input on, a list for each stack: an encoder–decoder has two."""
    holders = {outer for path in linear_roles(model) for outer in within(path)}
    found: list[list[str]] = []
    inside: tuple[str, ...] = ()
    for path, module in base_layers(model):
        if isinstance(module, nn.ModuleList) and len(module) and not path.startswith(inside):
            blocks = [f"{path}.{name}" for name, _ in module.named_children()]
            if holders.issuperset(blocks):
                found.append(blocks)
                inside += (f"{path}.",)
    return found
