"""How operations run on tensors that have no numbers: what each gives, and what of that is new memory."""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltatune.planning.work import Work, work_of

aten = torch.ops.aten
META = torch.device("meta")


class Form(NamedTuple):
    """What an operation does with memory."""

    fresh: bool
    """Whether all that it gives is new."""
    has_device: bool
    """Whether it is told a device."""
    writes: bool | str
    """Whether it gives its first argument, written over; or the name of the one that it gives."""


@cache
def form_of(operation: Any) -> Form:
    """What an operation does with memory, by what PyTorch declares of it."""
    schema = operation._schema
    aliased = any(one.alias_info is not None for one in (*schema.arguments, *schema.returns))
    aliased |= operation._overloadpacket is aten._unsafe_view  # which says that it is not
    has_device = any(one.name == "device" for one in schema.arguments)
    written = [place for place, one in enumerate(schema.arguments) if one.alias_info is not None]
    writes: bool | str = False
    if operation.namespace == "aten" and len(written) == len(schema.returns) == 1:
        one = schema.arguments[written[0]]
        resizes = torch.Tag.inplace_view in operation.tags or operation._overloadpacket in _RESIZING
        if one.alias_info.is_write and not resizes:
            writes = one.name if one.kwarg_only else written[0] == 0
    return Form(not aliased, has_device, writes)


_RESIZING = frozenset([aten.resize_, aten.resize_as_, aten.set_])


_seen: dict[Any, tuple[Any, Work | None]] = {}
"""What operations gave for inputs of certain shapes: to look it up takes a tenth of the time of working it out."""


def fresh(operation: Any, args: list[Any], options: dict[str, Any]) -> tuple[Any, Work | None]:
    """Runs an operation on meta tensors, or makes what it gave the last time for such ones; and what it was."""
    key = (operation, *map(_key, args), *((name, _key(value)) for name, value in options.items()))
    try:
        found = _seen.get(key)
    except TypeError:
        return operation(*args, **options), None
    if found is None:
        out = operation(*args, **options)
        work, recipe = work_of(operation, args, out), _recipe(out)
        if recipe is not None:
            _seen[key] = recipe, work
        return out, work
    recipe, work = found
    return _made(recipe), work


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return tuple(map(_key, value)) if isinstance(value, list) else (type(value), value)


def _recipe(out: Any) -> Any:
    if isinstance(out, Tensor):
        return tuple(out.shape), out.stride(), out.dtype
    return [_recipe(one) for one in out] if isinstance(out, (list, tuple)) else None


def _made(recipe: Any) -> Any:
    if isinstance(recipe, list):
        return tuple(map(_made, recipe))
    if recipe is None:
        return None
    shape, stride, dtype = recipe
    return torch.empty_strided(shape, stride, dtype=dtype, device=META)
