"""How a frozen weight is stored. Methods are written against `FrozenWeight` and work on every storage."""

from deltatune.weights.dense import DenseWeight
from deltatune.weights.frozen import FrozenWeight
from deltatune.weights.modules import is_linear, weight_of

__all__ = ["DenseWeight", "FrozenWeight", "is_linear", "weight_of"]
