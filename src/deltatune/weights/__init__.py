"""How a frozen weight is stored. Methods are written against `FrozenWeight` and work on every storage."""

from deltatune.weights.dense import DenseWeight
from deltatune.weights.frozen import FrozenWeight
from deltatune.weights.modules import is_linear, is_transposed, weight_of
from deltatune.weights.quantised import QuantisedLinear, QuantisedWeight, scratch_apart
from deltatune.weights.storage import DENSE, FORMATS, Storage, parse_storage

__all__ = [
    "DENSE",
    "FORMATS",
    "DenseWeight",
    "FrozenWeight",
    "QuantisedLinear",
    "QuantisedWeight",
    "Storage",
    "is_linear",
    "is_transposed",
    "parse_storage",
    "scratch_apart",
    "weight_of",
]
