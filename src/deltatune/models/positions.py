"""How many tokens a model has positions for, and where they begin."""

from typing import Any

from jaxtyping import Int
from torch import Tensor

from deltatune.errors import UserError

_FROM_PADDING = ("roberta", "xlm-roberta", "camembert", "data2vec-text")
"""Architectures that count positions from the padding id on: two of RoBERTa's 514 are never used by a token."""


def first_position(config: Any) -> int:
    """The position id of the first token."""
    return int(config.pad_token_id) + 1 if config.model_type in _FROM_PADDING else 0


def room_for_text(config: Any, virtual: int = 0) -> int | None:
    """The tokens that a text may have beside virtual ones; None where the model does not say.

    Raises `UserError` where fewer than two are left.
    """
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if positions is None:
        return None
    room = int(positions) - first_position(config) - virtual
    if virtual and room < 2:
        raise UserError(
            f"{virtual} virtual tokens leave no room for a text: this model has positions for {room + virtual} tokens",
            f"at most {room + virtual - 2} virtual tokens fit",
        )
    return room


def text_positions(mask: Int[Tensor, "examples total"], length: int, first: int) -> Int[Tensor, "examples length"]:
    """The position ids of the last `length` places of a mask, counted from `first` over those that are not padding."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:] + first
