"""What the laws are checked on: every registered method, and each storage of a frozen weight."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltatune.methods import METHODS, BlockInsert, Delta, Method, OverLayers, Site, SoftPrompt, WeightDelta, make
from deltatune.models.adapted import AdaptedLinear
from deltatune.weights import QuantisedLinear, Storage, weight_of

FITTING: dict[str, dict] = {
    "adalora": {"init_r": 6, "target_r": 3},
    "oft": {"block_size": 4},
    "hira": {"rank": 4},
    "miss": {"rank": 4},
    "vblora": {"vector_length": 4},
    "waveft": {"coefficients": 60},
    "fourierft": {"coefficients": 60},
    "shira": {"rank": 3},
    "last-k": {"k": 1},
    "select": {"parameters": "attention"},
    "houlsby": {"reduction": 8},
    "pfeiffer": {"reduction": 8},
    "compacter": {"reduction": 5, "n": 2},
    "adapterfusion": {"parts": ({"reduction": 4}, {"reduction": 8, "activation": "gelu", "scale": 2.0})},
    "prompt": {"virtual_tokens": 5},
    "ptuning": {"virtual_tokens": 5, "hidden": 8},
    "prefix": {"virtual_tokens": 5, "hidden": 8},
}
"""Options without which a method does not fit layers as small as the ones here, or has nothing to do."""

VARIANTS: dict[str, list[dict]] = {
    "lora": [
        {"rank": 3, "alpha": 5.0, "rslora": True},
        {"rank": 4, "dropout": 0.3},
        {"rank": 2, "bias": "adapted", "lr_ratio": 16.0},
        {"rank": 2, "alpha": 1.0, "rslora": True, "init": "pissa", "dropout": 0.3},
    ],
    "oft": [
        {"neumann_terms": 5},
        {"block_share": True},
        {"blocks": 2},
        {"block_size": 2, "neumann_terms": 4},
    ],
    "loha": [{"rank": 1}, {"rank": 2, "alpha": 5.0}],
    "lokr": [
        {"rank": 1, "alpha": 3.0, "decompose_both": True},
        {"rank": 2, "decompose_factor": 2},
    ],
    "hira": [{"rank": 3, "dropout": 0.3}],
    "adalora": [{"init_r": 3, "target_r": 2, "alpha": 5.0, "dropout": 0.3}],
    "ia3": [{"scales": "input"}],
    "miss": [{"rank": 5}, {"rank": 6, "dropout": 0.3}],
    "vblora": [
        {"rank": 2, "num_vectors": 20, "topk": 3, "vector_length": 2},
        {"dropout": 0.3},
        {"save_only_topk": True},
    ],
    "vera": [
        {"rank": 6, "d_initial": 0.5, "projection_seed": 3},
        {"rank": 16, "dropout": 0.3},
        {"rank": 16, "save_projection": False},
    ],
    "dora": [
        {"rank": 3, "alpha": 5.0, "rslora": True},
        {"rank": 4, "dropout": 0.3},
        {"rank": 3, "magnitude": "scalar-frobenius", "dropout": 0.3},
        {"rank": 3, "magnitude": "normalised-update"},
    ],
    "waveft": [
        {"coefficients": 200, "scaling": 3.0, "location_seed": 5},
        {"wavelet": "sym3"},
        {"idwt": False},
    ],
    "fourierft": [
        {"coefficients": 200, "scaling": 20.0, "location_seed": 5},
        {"init": "zeros"},
    ],
    "shira": [
        {"rank": 7, "mask_seed": 5},
    ],
    "full": [{"exclude": ["embeddings", "norms"]}],
    "bitfit": [{"biases": ["up", "norms"]}],
    "last-k": [{"k": 2}],
    "select": [{"parameters": ["embeddings", "mlp", ".*[.]0[.].*"], "exclude": "biases"}],
    "houlsby": [{"reduction": 4, "init": "zero-up", "scale": 0.5, "activation": "tanh"}],
    "pfeiffer": [{"activation": "silu", "leave_out": (0,)}],
    "compacter": [{"reduction": 2, "rank": 2, "init": "zero-up", "scale": 3.0, "activation": "relu"}],
    "parallel": [{"init": "normal", "scale": 1.0, "activation": "gelu"}],
    "prompt": [{"init": "noise"}, {"init": "text", "token_ids": (7, 9, 4)}],
    "ptuning": [{"encoder": "lstm"}],
    "prefix": [{"projection": True}],
}
"""Options that change a formula and so deserve the laws of their own; the defaults are always tested."""

PEFT_LACKS: dict[str, tuple[str, ...]] = {
    "oft": ("gpt2",),
    "loha": ("gpt2",),
    "lokr": ("gpt2",),
    "miss": ("gpt2",),
    "shira": ("gpt2",),
}
"""Architectures that PEFT refuses for a method although it has it: those with layers of type `Conv1D`."""


def _named(kind: str) -> dict[str, Method]:
    """Every registered method of a kind, with its defaults and with each variant, by a name for the test."""
    return {
        name + "".join(f",{key}={value}" for key, value in options.items()): make(
            name, {**FITTING.get(name, {}), **options}
        )
        for name, method in METHODS.items()
        if method.kind == kind
        for options in [{}, *VARIANTS.get(name, [])]
    }


DELTAS: dict[str, WeightDelta] = _named("weight delta")
INSERTS: dict[str, BlockInsert] = _named("block insert")
OVER_LAYERS: dict[str, OverLayers] = {**DELTAS, **INSERTS}
PROMPTS: dict[str, SoftPrompt] = _named("soft prompt")
SELECTIONS = _named("selection")
EVERY = {**OVER_LAYERS, **SELECTIONS}


def _linear(dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return nn.Linear(12, 20).to(dtype).requires_grad_(False)


def _conv1d() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        layer = Conv1D(20, 12).requires_grad_(False)
        layer.weight.normal_()
        layer.bias.normal_()
        return layer


STORAGES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: _linear(torch.float32),
    "linear-bf16": lambda: _linear(torch.bfloat16),
    "conv1d": _conv1d,
    "nf4": lambda: QuantisedLinear.of(_linear(torch.float32), Storage("nf4", block=16)),
}
"""A frozen layer of 12 inputs and 20 outputs in each storage."""


def adapted(method: OverLayers, storage: str) -> AdaptedLinear:
    """A layer of that storage with a fresh module of the method.

    Under an insert it is the layer that ends a sub-layer; one that stands beside is shown what `went_in`.
    """
    base = STORAGES[storage]()
    site = Site(20, 12, "layer.attention.query", "query", bias=True)
    if isinstance(method, BlockInsert):
        site = Site(20, 12, "layer.0.output.dense", "down", bias=True, begin="layer.0.intermediate.dense")
    method.check(site)
    generator = torch.Generator().manual_seed(0)
    layer = AdaptedLinear(base, site)
    layer.add("default", method.delta(site, layer.frozen, method.share([site], generator), generator))
    if isinstance(method, BlockInsert) and method.beside:
        layer.register_forward_pre_hook(lambda _, inputs: setattr(layer, "beside", went_in(*inputs)))
    return layer


def went_in(x: torch.Tensor) -> torch.Tensor:
    """What the sub-layer was given that `adapted` ends, where its last layer is given x."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(*x.shape[:-1], 20, generator=generator).to(x.dtype).requires_grad_()


def plain_output(layer: AdaptedLinear, x: torch.Tensor) -> torch.Tensor:
    """What an adapted layer gives, by the plain formula of its module."""
    weight = weight_of(layer.base).dense()
    if isinstance(layer.delta, Delta):
        return F.linear(x, layer.delta.merged(weight), layer.merged_bias)
    h = F.linear(x, weight, layer.bias)
    return h + layer.delta.added(went_in(x) if layer.delta.beside else h)


def shaken(module: nn.Module, seed: int = 3) -> nn.Module:
    """The module with random values in whatever trains, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def bits(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter and buffer."""
    return copy.deepcopy(dict(module.state_dict()))
