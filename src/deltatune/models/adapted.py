"""A linear layer with a method's delta over its frozen weight: what attaching puts in the layer's place."""

from typing import cast

import torch
from torch import Tensor, nn

from deltatune.errors import UserError
from deltatune.methods import Delta
from deltatune.weights import FrozenWeight, weight_of


class AdaptedLinear(nn.Module):
    """The frozen `base` layer and the `delta` that trains; behaves as the layer it replaces.

    `enabled = False` gives the base's own output, bit for bit.
    """

    def __init__(self, base: nn.Module, delta: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.delta = delta
        self.enabled = True
        self._before_merge: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out). Under autocast, in its type."""
        if self.merged or not self.enabled:
            output: Tensor = self.base(x)
            return output
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        output = cast(Delta, self.delta)(flat, self.frozen, self.bias)
        return output.view(*x.shape[:-1], -1)

    @property
    def frozen(self) -> FrozenWeight:
        """The base's weight, as methods see it."""
        return weight_of(self.base)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: model code that asks a linear layer for its type or shape finds it here."""
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return cast(Tensor | None, self.base.bias)

    @property
    def in_features(self) -> int:
        """Columns of W, as on `nn.Linear`."""
        return self.frozen.in_

    @property
    def out_features(self) -> int:
        """Rows of W, as on `nn.Linear`."""
        return self.frozen.out

    @property
    def merged(self) -> bool:
        """Whether the delta stands in the base's weight now."""
        return self._before_merge is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Writes W' over W and keeps W's bits for `unmerge`. Raises `UserError` where W' is not finite."""
        if self.merged:
            return
        weight = cast(Delta, self.delta).merged(self.frozen.dense())
        if not torch.isfinite(weight).all():
            raise UserError("the merged weight has values that are not finite", "the adapter is damaged or diverged")
        self._before_merge = self.frozen.dense().clone()
        self.frozen.write(weight)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts back the bits that W had before `merge`."""
        if self._before_merge is not None:
            self.frozen.write(self._before_merge)
            self._before_merge = None

    def extra_repr(self) -> str:
        """The states that change the output, when they are not the usual ones."""
        return ", ".join(word for word, holds in (("merged", self.merged), ("disabled", not self.enabled)) if holds)
