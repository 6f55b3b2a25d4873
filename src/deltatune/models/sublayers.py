"""The sub-layers in a model's blocks, told by the roles of its layers: where block inserts stand.

A block holds one feed-forward sub-layer and one or more of attention. What a sub-layer adds to the residual stream is
what its last linear layer gives.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import nn

from deltatune.errors import UserError
from deltatune.methods import BlockInsert
from deltatune.models.blocks import stacks
from deltatune.models.roles import Role
from deltatune.models.targets import Matched, below

_ENDS: Mapping[str, Role] = {"attention-output": "attention-output", "mlp-down": "down"}
"""The targets that mean every sub-layer of a kind → the role of the layer that ends one."""


def in_blocks(model: nn.Module, method: BlockInsert, matched: Matched, roles: Mapping[str, Role]) -> Matched:
    """What `matched` has outside of the blocks that the method leaves out.

    Raises `UserError` for numbers of blocks that the model does not have, and where a target means every sub-layer of a
    kind and the layer that ends one is not known: an adapter never stands in a part of the blocks alone.
    """
    blocks = [block for stack in stacks(model) for block in stack]
    for number in method.leave_out:
        if not 0 <= number < len(blocks):
            raise UserError(
                f"{method.name}: leave_out has {number}, and the model has {len(blocks)} blocks",
                f"they are numbered from 0 to {len(blocks) - 1}",
            )
    for target in matched.entries:
        if target in _ENDS:
            _refuse_gaps(method.name, _ENDS[target], blocks, roles)
        if target == "mlp-down":
            _refuse_experts(method.name, model)
    left = [blocks[number] for number in method.leave_out]
    kept = {entry: tuple(path for path in paths if not below(path, left)) for entry, paths in matched.entries.items()}
    if not any(kept.values()):
        raise UserError(f"{method.name}: leave_out leaves no block of {len(blocks)} to adapt", "leave out fewer")
    return Matched(kept)


def beginnings(roles: Mapping[str, Role]) -> dict[str, str]:
    """The layer that takes in each feed-forward sub-layer, by the path of the layer that ends it; where both are."""
    parts: dict[str, dict[Role, str]] = {}
    for path, role in roles.items():
        parts.setdefault(_sub_layer(path), {}).setdefault(role, path)
    begin = {part: found.get("up", found.get("gate", "")) for part, found in parts.items()}  # both read the same
    return {path: begin[_sub_layer(path)] for path, role in roles.items() if role == "down"}


def _refuse_gaps(method: str, end: Role, blocks: Sequence[str], roles: Mapping[str, Role]) -> None:
    """Raises `UserError` for a block without a layer of the role `end`, and a sub-layer without one of its own."""
    parts: dict[str, Counter[Role]] = {}
    for path, role in roles.items():
        if below(path, blocks):
            parts.setdefault(_sub_layer(path), Counter())[role] += 1
    wrong = [block for block in blocks if not any(count[end] for part, count in parts.items() if below(part, [block]))]
    for part, count in parts.items():
        if end == "down":
            wrong += [part] if (count["up"] or count["gate"]) and count["down"] != 1 else []
        else:
            wrong += [part] if count["query"] + count["qkv"] != count[end] else []
    if wrong:
        found = Counter(role for path, role in roles.items() if below(path, wrong[:1]))
        raise UserError(
            f"{method}: it is not clear which layer of {wrong[0]} has the role {end}, where it would stand: "
            f"there {'is' if found[end] == 1 else 'are'} {found[end] or 'none'}",
            f"its linear layers have the roles: {', '.join(sorted(found)) or 'none'}; name in targets those that end "
            "its sub-layers",
        )


def _refuse_experts(method: str, model: nn.Module) -> None:
    """Raises `UserError` for a mixture of experts: a layer that ends the shared one of them ends no sub-layer."""
    for path, _ in model.named_modules():
        if path.rpartition(".")[2] == "experts":
            raise UserError(
                f"{method}: {path} is a mixture of experts, so no layer of the role down ends its sub-layer",
                "use targets=attention-output, or name layers",
            )


def _sub_layer(path: str) -> str:
    """The path up to its last number: the smallest numbered part around a layer, a whole block or a piece of one."""
    parts = path.split(".")
    last = max((place for place, part in enumerate(parts) if part.isdecimal()), default=-1)
    return ".".join(parts[: last + 1])
