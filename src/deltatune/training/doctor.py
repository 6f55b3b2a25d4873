"""What runs use on this machine, and why: precision, attention, decoding of weights in few bits."""

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from deltatune.models import short_attention
from deltatune.models.base import Base
from deltatune.training.attention import SHORT, choose_attention
from deltatune.training.precision import resolve
from deltatune.weights.kernel import decode_blocks


@dataclass(frozen=True)
class Finding:
    """One choice."""

    what: str
    chosen: str
    why: str


def examine_machine(device: torch.device | str = "cpu") -> list[Finding]:
    """What any run uses on that device."""
    device, precision = torch.device(device), resolve("auto", device)
    features = ", ".join(name for name, has in torch.cpu.get_capabilities().items() if "bf16" in name and has is True)
    hardware = f"it has {features}" if device.type == "cpu" and features else "it multiplies bf16 in hardware"
    findings = [
        Finding("threads", str(torch.get_num_threads()), "PyTorch's own choice; OMP_NUM_THREADS sets another"),
        Finding("precision", precision, hardware if precision == "bf16" else "it has no products in bf16"),
    ]
    if device.type == "cpu":
        findings += [
            Finding(
                "attention",
                f"plain products up to {SHORT} tokens, PyTorch's fused one beyond",
                "a CPU's fused kernel is slower on short texts (benchmarks/step.py)",
            ),
            Finding("dropout", "from random bits", "PyTorch's draws a float for each element"),
        ]
    return [*findings, _decoding(precision, device)]


def _decoding(precision: str, device: torch.device) -> Finding:
    out = torch.empty(64, dtype=torch.bfloat16 if precision == "bf16" else torch.float32, device=device)
    codes, scales = torch.zeros(32, dtype=torch.uint8, device=device), torch.ones(1, device=device)
    if decode_blocks("nf4", codes, scales, out, 64):
        return Finding("decoding of nf4 and fp4", "bitsandbytes' kernel", "it is installed, and gives what it should")
    installed = "does not give what it should here" if find_spec("bitsandbytes") else "is not installed"
    return Finding("decoding of nf4 and fp4", "PyTorch", f"bitsandbytes {installed}")


def examine_base(base: Base, length: int) -> list[Finding]:
    """What runs on this base use for texts of that length; its attention is set."""
    choose_attention(base.model, length)
    chosen = str(base.model.config._attn_implementation)
    if chosen == short_attention.NAME:
        why = "it gives what the architecture's own gives, tried out just now"
    elif base.model.device.type == "cpu" and length <= SHORT:
        why = "the one for short texts does not give what this architecture's own gives"
    else:
        why = f"texts have {length} tokens" if base.model.device.type == "cpu" else "it is not on a CPU"
    return [Finding(f"attention of {base.id}", chosen, why)]
