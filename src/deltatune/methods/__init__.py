"""What is trained: one file per method, and the contract they share."""

from deltatune.methods.adalora import AdaLoRA
from deltatune.methods.adapterfusion import AdapterFusion
from deltatune.methods.bitfit import BitFit
from deltatune.methods.compacter import Compacter
from deltatune.methods.contract import (
    BaseParameter,
    BlockInsert,
    Delta,
    EmbeddingDelta,
    Insert,
    Method,
    Observer,
    OverLayers,
    Seat,
    Selection,
    Site,
    SoftPrompt,
    Targets,
    WeightDelta,
)
from deltatune.methods.dora import DoRA
from deltatune.methods.fourierft import FourierFT
from deltatune.methods.full import Full
from deltatune.methods.head import Head
from deltatune.methods.hira import HiRA
from deltatune.methods.houlsby import Houlsby
from deltatune.methods.ia3 import IA3
from deltatune.methods.last_k import LastK
from deltatune.methods.loha import LoHa
from deltatune.methods.lokr import LoKr
from deltatune.methods.lora import LoRA
from deltatune.methods.miss import MiSS
from deltatune.methods.mixed import Mixed
from deltatune.methods.none import NoTraining
from deltatune.methods.norms import Norms
from deltatune.methods.oft import OFT
from deltatune.methods.parallel import Parallel
from deltatune.methods.pfeiffer import Pfeiffer
from deltatune.methods.prefix import Prefix
from deltatune.methods.prompt import Prompt
from deltatune.methods.ptuning import PTuning
from deltatune.methods.registry import METHODS, make, options_of, parse
from deltatune.methods.select import Select
from deltatune.methods.shira import SHiRA
from deltatune.methods.vblora import VBLoRA
from deltatune.methods.vera import VeRA
from deltatune.methods.waveft import WaveFT
from deltatune.words import parse_option

__all__ = [
    "IA3",
    "METHODS",
    "OFT",
    "AdaLoRA",
    "AdapterFusion",
    "BaseParameter",
    "BitFit",
    "BlockInsert",
    "Compacter",
    "Delta",
    "DoRA",
    "EmbeddingDelta",
    "FourierFT",
    "Full",
    "Head",
    "HiRA",
    "Houlsby",
    "Insert",
    "LastK",
    "LoHa",
    "LoKr",
    "LoRA",
    "Method",
    "MiSS",
    "Mixed",
    "NoTraining",
    "Norms",
    "Observer",
    "OverLayers",
    "PTuning",
    "Parallel",
    "Pfeiffer",
    "Prefix",
    "Prompt",
    "SHiRA",
    "Seat",
    "Select",
    "Selection",
    "Site",
    "SoftPrompt",
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
