"""What runs use on this machine, and why: precision, attention, decoding of weights in few bits."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from deltatune import kernels
from deltatune.models.base import Base
from deltatune.training.attention import most_tokens
from deltatune.training.memory import keeps_freed
from deltatune.training.pieces import COMPILED, FOR_A_CPU, PIECES, Piece, quicken
from deltatune.training.pooled import pooled
from deltatune.training.precision import resolve
from deltatune.training.profile import pieces_of, random_batch
from deltatune.training.tasks import task_for
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
                f"{'compiled' if kernels.wide() else 'plain products'} up to {most_tokens()} tokens, PyTorch's beyond",
                "PyTorch's is slower on short texts (benchmarks/step.py)",
            ),
            Finding("dropout", "from random bits", "PyTorch's draws a float for each element"),
            Finding(
                "between products",
                "PyTorch" if kernels.missing() else "compiled loops",
                kernels.missing() or "one pass each for norms, gates, GELU, rotations, attention, dropout and the loss",
            ),
            Finding("memory that a step frees", *_freed()),
        ]
    return [*findings, _decoding(precision, device)]


def _freed() -> tuple[str, str]:
    if keeps_freed():
        return "stays, in large pages", "glibc would give it back, and it would be cleared anew; heap=0 lets it"
    return "goes where the C library has it go", "that is not glibc"


def _decoding(precision: str, device: torch.device) -> Finding:
    if device.type == "cpu":
        why = kernels.missing()
        return Finding(
            "decoding of weights", "PyTorch" if why else "a compiled loop", why or "one pass, scales included"
        )
    out = torch.empty(64, dtype=torch.bfloat16 if precision == "bf16" else torch.float32, device=device)
    codes, scales = torch.zeros(32, dtype=torch.uint8, device=device), torch.ones(1, device=device)
    if decode_blocks("nf4", codes, scales, out, 64):
        return Finding("decoding of weights", "bitsandbytes' operator for nf4 and fp4", "it gives what it should here")
    installed = "does not give what it should here" if find_spec("bitsandbytes") else "is not installed"
    return Finding("decoding of weights", "PyTorch", f"bitsandbytes {installed}")


def examine_base(base: Base, length: int) -> list[Finding]:
    """Which fast pieces runs on this base have for texts of that length, and why; they are put into it.

    A method can rule one out: soft prompts stand before each text, and norms that train are left as they are.
    """
    model = base.model.requires_grad_(False)  # as beside an adapter
    quicken(model, length)
    task = task_for(base, resolve("auto", model.device))
    batch = random_batch(base, task, 2, 6)
    with pooled(model, lambda: task.run(batch)) as reads_one:
        used = pieces_of(model, task, batch, reads_one)
    findings = []
    for piece in PIECES:
        why = _TRIED[piece] if piece in used else _without(piece, base, length)
        chosen = (
            str(model.config._attn_implementation) if piece == "attention" else "fast" if piece in used else "plain"
        )
        findings.append(Finding(f"{piece} of {base.id}", chosen, why))
    return findings


_TRIED: Mapping[Piece, str] = {
    "attention": "it gives what the architecture's own gives, tried out just now",
    "dropout": "the model has it, and runs on a CPU",
    "gates": "the layer is SiLU(gate) · up",
    "gelu": "the model has it, and computes it in one pass where that is in bf16",
    "norms": "ours give what the architecture's own give, tried out just now",
    "packing": "texts in one row are told apart, tried out just now",
    "pooled": "the last block gives the classifier what it gave, tried out just now",
    "products": "the loop is faster where pairs of bf16 are multiplied (benchmarks/pieces.py)",
    "rotations": "it turns the halves of a head, tried out just now",
    "sharing": "texts that begin alike are given what they have in common, tried out just now",
}


def _without(piece: Piece, base: Base, length: int) -> str:
    """Why a base goes without a piece."""
    device, writes = base.model.device.type, base.task == "generation"
    if piece in COMPILED and kernels.missing():
        return kernels.missing()
    if piece in FOR_A_CPU and device != "cpu":
        return f"it is made for a CPU, and the model is on {device}"
    if piece == "attention":
        too_long = f"texts have {length} tokens, and it is for {most_tokens()} at most"
        return too_long if length > most_tokens() else "it does not give what this architecture's own gives"
    if piece == "dropout":
        return "the model has none"
    if piece == "norms":
        return "the model has none that take the root of a mean square, or ours give something else"
    if piece == "gates":
        return "the model has none, or not of SiLU"
    if piece == "gelu":
        return "the model has none, or one of another form"
    if piece == "products":
        return "this processor multiplies no pairs of bf16, or the model is not in bf16"
    if piece == "rotations":
        return "the model has none that turn the halves of a head, or does more in the same function"
    if piece == "sharing":
        return "it takes packed texts and our own attention" if writes else "a classifier's texts stay by themselves"
    if piece == "packing":
        apart = "texts in one row are not told apart by this architecture's attention, or not with this one"
        return apart if writes else "a classifier's texts stay in rows of their own"
    return "all tokens are read" if writes else "the classifier reads more than the first token, or is not known to us"
