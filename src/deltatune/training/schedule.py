"""Learning rate over a run: a linear warm-up from 0, then linear, cosine or constant."""

import math
from typing import Literal


def rate(step: int, steps: int, warmup: float, schedule: Literal["linear", "cosine", "constant"]) -> float:
    """The share of the peak rate at optimiser step `step`, counted from 0, of `steps`: in (0, 1].

    The warm-up takes ⌈warmup · steps⌉ steps, the first of which is not 0: a step at rate 0 would be wasted.
    """
    rise = math.ceil(warmup * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    if schedule == "constant":
        return 1.0
    left = 1 - (step - rise) / max(1, steps - rise)
    return left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))
