"""What numbers a run computes with: bf16 where the machine has it in hardware, fp32 elsewhere; masters always fp32."""

import platform
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltatune.errors import UserError
from deltatune.training.memory import give_back
from deltatune.weights import QuantisedLinear

Computed = Literal["fp32", "bf16"]
Precision = Literal["auto", "fp32", "bf16"]


def resolve(precision: Precision, device: torch.device | str = "cpu") -> Computed:
    """Decides `auto` by the device's features."""
    if precision == "auto":
        return "bf16" if has_fast_bf16(torch.device(device)) else "fp32"
    if precision not in ("fp32", "bf16"):
        raise UserError(f"there is no precision '{precision}'", "use auto, fp32 or bf16")
    return precision


def has_fast_bf16(device: torch.device) -> bool:
    """Whether products in bf16 run in hardware: AVX512_BF16 or AMX on x86, BF16 on Arm, Ampere or later on CUDA."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    features = torch.cpu.get_capabilities()
    if platform.machine() in ("x86_64", "AMD64"):
        return bool(features.get("amx_bf16") or features.get("avx512_bf16"))
    return bool(features.get("bf16"))


def prepare(model: nn.Module, precision: Computed) -> None:
    """Stores what is frozen in the run's type and what trains in fp32.

    In bf16 the frozen weights take half the memory and are computed with as they are; autocast brings the fp32 masters
    down to bf16 where they meet them. Weights in a storage of their own stay in it.
    """
    frozen = torch.bfloat16 if precision == "bf16" else torch.float32
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            module.dtype = frozen
        own = [parameter for parameter in module.parameters(recurse=False) if parameter.is_floating_point()]
        # A norm takes its gain and shift in one type only.
        together = all(parameter.ndim == 1 for parameter in own) and any(parameter.requires_grad for parameter in own)
        for parameter in own:
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad or together else frozen)
    give_back()  # the holes that the former weights have left


def autocast(precision: Computed, device: torch.device) -> torch.autocast:
    """The context in which the model runs forward."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=True)


def alike(found: Float[Tensor, "*tokens width"], expected: Float[Tensor, "*tokens width"], precision: Computed) -> bool:
    """Whether states of the same tokens differ by no more than rounding in that precision: for no token by a larger
    share of its norm.

    Not by a share of the largest number: in language models a first token's is a thousand times the others', and what
    reaches it through 16 bits is off by several percent whichever way it was computed.
    """
    if found.shape != expected.shape:
        return False
    found, expected = found.float(), expected.float()
    apart = (found - expected).norm(dim=-1)
    return bool((apart <= _ROUNDING[precision] * expected.norm(dim=-1)).all())


_ROUNDING: dict[Computed, float] = {"fp32": 1e-4, "bf16": 0.1}
