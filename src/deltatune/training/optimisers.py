"""The optimisers of a run: AdamW, and AdamW with small states."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from deltatune.training.eight_bit import AdamW8bit
from deltatune.training.paged import paged_adamw

Optimiser = Literal["adamw", "adamw8bit", "paged"]


def make_optimiser(
    name: Optimiser,
    parameters: dict[str, nn.Parameter],
    factors: dict[str, float],
    decay: float,
    paged_folder: Path | None = None,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101), its moments kept as `name` says; only matrices decay.

    Parameters with the same factor of the learning rate share a group; the loop sets each group's rate.
    Raises `UserError` where a paged one cannot be had.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for path, parameter in parameters.items():
        groups.setdefault((parameter.ndim > 1, factors[path]), []).append(parameter)
    options: list[dict[str, Any]] = [
        {"params": group, "weight_decay": decay if matrix else 0.0, "factor": factor}
        for (matrix, factor), group in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]
    if name == "adamw8bit":
        return AdamW8bit(options)
    if name == "paged":
        return paged_adamw(options, paged_folder)
    return torch.optim.AdamW(options, fused=True)
