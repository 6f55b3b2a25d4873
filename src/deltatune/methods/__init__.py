"""What is trained: one file per method, and the contract they share."""

from deltatune.methods.contract import Delta, EmbeddingDelta, Method, Selection, Site, Targets, WeightDelta
from deltatune.methods.full import Full
from deltatune.methods.head import Head
from deltatune.methods.lora import LoRA
from deltatune.methods.registry import METHODS, make, options_of, parse, parse_option
from deltatune.methods.vblora import VBLoRA
from deltatune.methods.vera import VeRA

__all__ = [
    "METHODS",
    "Delta",
    "EmbeddingDelta",
    "Full",
    "Head",
    "LoRA",
    "Method",
    "Selection",
    "Site",
    "Targets",
    "VBLoRA",
    "VeRA",
    "WeightDelta",
    "make",
    "options_of",
    "parse",
    "parse_option",
]
