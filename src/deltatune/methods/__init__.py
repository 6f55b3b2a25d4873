"""What is trained: one file per method, and the contract they share."""

from deltatune.methods.adalora import AdaLoRA
from deltatune.methods.bitfit import BitFit
from deltatune.methods.contract import (
    BaseParameter,
    BlockInsert,
    Delta,
    EmbeddingDelta,
    Insert,
    Method,
    Observer,
    OverLayers,
    Selection,
    Site,
    Targets,
    WeightDelta,
)
from deltatune.methods.dora import DoRA
from deltatune.methods.fourierft import FourierFT
from deltatune.methods.full import Full
from deltatune.methods.head import Head
from deltatune.methods.hira import HiRA
from deltatune.methods.ia3 import IA3
from deltatune.methods.last_k import LastK
from deltatune.methods.loha import LoHa
from deltatune.methods.lokr import LoKr
from deltatune.methods.lora import LoRA
from deltatune.methods.miss import MiSS
from deltatune.methods.mixed import Mixed
from deltatune.methods.norms import Norms
from deltatune.methods.oft import OFT
from deltatune.methods.registry import METHODS, make, options_of, parse, parse_option
from deltatune.methods.select import Select
from deltatune.methods.shira import SHiRA
from deltatune.methods.vblora import VBLoRA
from deltatune.methods.vera import VeRA
from deltatune.methods.waveft import WaveFT

__all__ = [
    "IA3",
    "METHODS",
    "OFT",
    "AdaLoRA",
    "BaseParameter",
    "BitFit",
    "BlockInsert",
    "Delta",
    "DoRA",
    "EmbeddingDelta",
    "FourierFT",
    "Full",
    "Head",
    "HiRA",
    "Insert",
    "LastK",
    "LoHa",
    "LoKr",
    "LoRA",
    "Method",
    "MiSS",
    "Mixed",
    "Norms",
    "Observer",
    "OverLayers",
    "SHiRA",
    "Select",
    "Selection",
    "Site",
    "Targets",
    "VBLoRA",
    "VeRA",
    "WaveFT",
    "WeightDelta",
    "make",
    "options_of",
    "parse",
    "parse_option",
]
