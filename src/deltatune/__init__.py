"""Deltatune: adapt a pretrained model by training a few parameters, and know what each way costs and brings.

The public names, each imported when it is first used, so that `import deltatune` costs nothing.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltatune.comparing.compare import Comparison, compare
    from deltatune.comparing.experiment import Experiment, make_experiment, read_experiment
    from deltatune.data import Dialogue, DialogueData, Dialogues, Split, TextData, Turn, load_data
    from deltatune.errors import UserError
    from deltatune.methods import (
        IA3,
        METHODS,
        OFT,
        AdaLoRA,
        AdapterFusion,
        BitFit,
        Compacter,
        DoRA,
        FourierFT,
        Full,
        Head,
        HiRA,
        Houlsby,
        LastK,
        LoHa,
        LoKr,
        LoRA,
        MiSS,
        Mixed,
        Norms,
        NoTraining,
        Parallel,
        Pfeiffer,
        Prefix,
        Prompt,
        PTuning,
        Select,
        SHiRA,
        VBLoRA,
        VeRA,
        WaveFT,
        make,
    )
    from deltatune.models.adapters import load_adapter, read_adapter, save_adapter
    from deltatune.models.attach import activate, after_step, attach, attachment, detach, disabled, penalty
    from deltatune.models.base import Base, load, originals
    from deltatune.models.combine import Combined, combine
    from deltatune.models.merge import Merged, fold, merge, unmerge
    from deltatune.models.quantise import dequantise, quantise
    from deltatune.models.vocabulary import add_tokens
    from deltatune.scoring import TextScores, score_texts
    from deltatune.training.settings import Training
    from deltatune.training.tune import Tuned, tune

# PyTorch reads this when it first takes memory: large tensors lie in large pages, which a CPU finds faster. 0 is off.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_HOMES = {
    "deltatune.comparing.compare": ("Comparison", "compare"),
    "deltatune.comparing.experiment": ("Experiment", "make_experiment", "read_experiment"),
    "deltatune.data": ("Dialogue", "DialogueData", "Dialogues", "Split", "TextData", "Turn", "load_data"),
    "deltatune.errors": ("UserError",),
    "deltatune.methods": (
        *("METHODS", "make", "Full", "Head", "NoTraining"),
        *("LoRA", "DoRA", "AdaLoRA", "VBLoRA", "VeRA", "HiRA", "LoHa", "LoKr", "MiSS", "OFT", "IA3"),
        *("WaveFT", "FourierFT", "SHiRA"),
        *("BitFit", "Norms", "LastK", "Select", "Mixed"),
        *("Houlsby", "Pfeiffer", "Parallel", "Compacter", "AdapterFusion"),
        *("Prompt", "PTuning", "Prefix"),
    ),
    "deltatune.models.adapters": ("load_adapter", "read_adapter", "save_adapter"),
    "deltatune.models.attach": ("activate", "after_step", "attach", "attachment", "detach", "disabled", "penalty"),
    "deltatune.models.base": ("Base", "load", "originals"),
    "deltatune.models.combine": ("Combined", "combine"),
    "deltatune.models.merge": ("Merged", "fold", "merge", "unmerge"),
    "deltatune.models.quantise": ("dequantise", "quantise"),
    "deltatune.models.vocabulary": ("add_tokens",),
    "deltatune.planning.plan": ("Plan", "plan"),
    "deltatune.scoring": ("TextScores", "score_texts"),
    "deltatune.training.settings": ("Training",),
    "deltatune.training.tune": ("Tuned", "tune"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "IA3",
    "METHODS",
    "OFT",
    "AdaLoRA",
    "AdapterFusion",
    "Base",
    "BitFit",
    "Combined",
    "Compacter",
    "Comparison",
    "Dialogue",
    "DialogueData",
    "Dialogues",
    "DoRA",
    "Experiment",
    "FourierFT",
    "Full",
    "Head",
    "HiRA",
    "Houlsby",
    "LastK",
    "LoHa",
    "LoKr",
    "LoRA",
    "Merged",
    "MiSS",
    "Mixed",
    "NoTraining",
    "Norms",
    "PTuning",
    "Parallel",
    "Pfeiffer",
    "Plan",
    "Prefix",
    "Prompt",
    "SHiRA",
    "Select",
    "Split",
    "TextData",
    "TextScores",
    "Training",
    "Tuned",
    "Turn",
    "UserError",
    "VBLoRA",
    "VeRA",
    "WaveFT",
    "activate",
    "add_tokens",
    "after_step",
    "attach",
    "attachment",
    "combine",
    "compare",
    "dequantise",
    "detach",
    "disabled",
    "fold",
    "load",
    "load_adapter",
    "load_data",
    "make",
    "make_experiment",
    "merge",
    "originals",
    "penalty",
    "plan",
    "quantise",
    "read_adapter",
    "read_experiment",
    "save_adapter",
    "score_texts",
    "tune",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'deltatune' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
