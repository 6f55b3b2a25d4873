"""What operations do with memory, by what PyTorch declares of them: what they give that is new, what they write."""

from functools import cache
from typing import Any

import torch

aten = torch.ops.aten
NOTHING = "nothing"


class Form:
    """What an operation does with memory. One for each operation, which it stands for in keys."""

    __slots__ = ("fresh", "has_device", "reshapes", "writes")

    def __init__(self, operation: Any) -> None:
        schema = operation._schema
        arguments = schema.arguments
        aliased = any(one.alias_info is not None for one in schema.returns)
        written = [one for one in arguments if one.alias_info is not None and one.alias_info.is_write]
        self.reshapes: bool = torch.Tag.inplace_view in operation.tags
        """Whether its argument itself has another form afterwards."""
        self.fresh: bool = not aliased and operation._overloadpacket is not aten._unsafe_view  # which does not say so
        """Whether all that it gives is new."""
        self.has_device: bool = any(one.name == "device" for one in arguments)
        """Whether it is told a device."""
        self.writes: int | str | None = None
        """The argument that it writes over and gives, by its place or name, or `NOTHING`: it need not be run."""
        if self.reshapes or operation._overloadpacket in _RESIZING or not written:
            return
        if not schema.returns:
            self.writes = NOTHING
        elif aliased and len(written) == len(schema.returns) == 1:
            if written[0].kwarg_only:
                self.writes = written[0].name
            elif written[0].name == arguments[0].name:
                self.writes = 0


form_of = cache(Form)
_RESIZING = frozenset([aten.resize_, aten.resize_as_, aten.set_])
