"""What is trained: one file per method, and the contract they share."""

from deltatune.methods.contract import Delta, EmbeddingDelta, Method, Selection, Site, Targets, WeightDelta
from deltatune.methods.fourierft import FourierFT
from deltatune.methods.full import Full
from deltatune.methods.head import Head
from deltatune.methods.lora import LoRA
from deltatune.methods.registry import METHODS, make, options_of, parse, parse_option
from deltatune.methods.shira import SHiRA
from deltatune.methods.waveft import WaveFT

__all__ = [
    "METHODS",
    "Delta",
    "EmbeddingDelta",
    "FourierFT",
    "Full",
    "Head",
    "LoRA",
    "Method",
    "SHiRA",
    "Selection",
    "Site",
    "Targets",
    "WaveFT",
    "WeightDelta",
    "make",
    "options_of",
    "parse",
    "parse_option",
]
