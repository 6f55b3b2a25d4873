"""What is trained: one file per method, and the contract they share."""

from deltatune.methods.contract import Delta, EmbeddingDelta, Method, Observer, Selection, Site, Targets, WeightDelta
from deltatune.methods.dora import DoRA
from deltatune.methods.full import Full
from deltatune.methods.head import Head
from deltatune.methods.lora import LoRA
from deltatune.methods.registry import METHODS, make, options_of, parse, parse_option

__all__ = [
    "METHODS",
    "Delta",
    "DoRA",
    "EmbeddingDelta",
    "Full",
    "Head",
    "LoRA",
    "Method",
    "Observer",
    "Selection",
    "Site",
    "Targets",
    "WeightDelta",
    "make",
    "options_of",
    "parse",
    "parse_option",
]
