"""The blocks of a model and the sub-layers in them, told by the roles of its layers: where block inserts stand.

A block is a numbered part of the model, such as `bert.encoder.layer.3`; it holds one feed-forward sub-layer and one or
more of attention. What a sub-layer adds to the residual stream is what its last linear layer gives.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

from deltatune.errors import UserError
from deltatune.methods import BlockInsert
from deltatune.models.roles import Role
from deltatune.models.targets import Matched

_ENDS: Mapping[str, Role] = {"attention-output": "attention-output", "mlp-down": "down"}
"""The targets that mean every sub-layer of a kind → the role of the layer that ends one."""


def in_blocks(method: BlockInsert, matched: Matched, roles: Mapping[str, Role]) -> Matched:
    """What `matched` has outside of the blocks that the method leaves out.

    Raises `UserError` for numbers of blocks that the model does not have, and where a target means every sub-layer of a
    kind and the layer that ends one is not known: an adapter never stands in a part of the blocks alone.
    """
    blocks = list(dict.fromkeys(_block(path) for path in roles if _block(path)))
    for number in method.leave_out:
        if not 0 <= number < len(blocks):
            raise UserError(
                f"{method.name}: leave_out has {number}, and the model has {len(blocks)} blocks",
                f"they are numbered from 0 to {len(blocks) - 1}",
            )
    for target in matched.entries:
        if target in _ENDS:
            _refuse_gaps(method.name, _ENDS[target], blocks, roles)
    left = {blocks[number] for number in method.leave_out}
    kept = {
        entry: tuple(path for path in paths if _block(path) not in left) for entry, paths in matched.entries.items()
    }
    if not any(kept.values()):
        raise UserError(f"{method.name}: leave_out leaves no block of {len(blocks)} to adapt", "leave out fewer")
    return Matched(kept)


def begin_of(path: str, roles: Mapping[str, Role]) -> str:
    """The layer that takes in the feed-forward sub-layer that the one at `path` ends; empty where there is none."""
    if roles[path] != "down":
        return ""
    begins: dict[Role, str] = {}
    for other, role in roles.items():
        if _sub_layer(other) == _sub_layer(path):
            begins.setdefault(role, other)
    return begins.get("up", begins.get("gate", ""))  # both read the same


def _refuse_gaps(method: str, end: Role, blocks: Iterable[str], roles: Mapping[str, Role]) -> None:
    """Raises `UserError` for a block without a layer of the role `end`, and a sub-layer without one of its own."""
    counts: dict[str, Counter[Role]] = {block: Counter() for block in blocks}
    parts: dict[str, Counter[Role]] = {}
    for path, role in roles.items():
        if _block(path):
            counts[_block(path)][role] += 1
            parts.setdefault(_sub_layer(path), Counter())[role] += 1
    wrong = [block for block, count in counts.items() if not count[end]]
    for part, count in parts.items():
        if end == "down":
            wrong += [part] if (count["up"] or count["gate"]) and count["down"] != 1 else []
        else:
            wrong += [part] if count["query"] + count["qkv"] != count[end] else []
    if wrong:
        found = Counter(role for path, role in roles.items() if f"{path}.".startswith(f"{wrong[0]}."))
        raise UserError(
            f"{method}: it is not clear which layer of {wrong[0]} has the role {end}, where it would stand: "
            f"there {'is' if found[end] == 1 else 'are'} {found[end] or 'none'}",
            f"its linear layers have the roles: {', '.join(sorted(found)) or 'none'}; name in targets those that end "
            "its sub-layers",
        )


def _block(path: str) -> str:
    """The path up to its first number; empty where it has none."""
    parts = path.split(".")
    return next((".".join(parts[: place + 1]) for place, part in enumerate(parts) if part.isdecimal()), "")


def _sub_layer(path: str) -> str:
    """The path up to its last number: the smallest numbered part around a layer, a whole block or a piece of one."""
    parts = path.split(".")
    last = max((place for place, part in enumerate(parts) if part.isdecimal()), default=-1)
    return ".".join(parts[: last + 1])
