"""Single passes over activations, weights in few bits and logits: what PyTorch makes several of."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from deltatune.kernels.loops import Loop, operator


def rms_norm(
    x: Float[Tensor, "rows width"], weight: Float[Tensor, " width"], epsilon: float
) -> tuple[Float[Tensor, "rows width"], Float[Tensor, " rows"]]:
    """w · (x·r), and r = 1 / √(mean(x²) + ε) in fp32; x·r is rounded to the type of x before w."""
    found: tuple[Tensor, Tensor] = _RMS_NORM(x.contiguous(), weight, epsilon)
    return found


def rms_norm_backward(
    x: Float[Tensor, "rows width"],
    weight: Float[Tensor, " width"],
    scales: Float[Tensor, " rows"],
    dy: Float[Tensor, "rows width"],
) -> Float[Tensor, "rows width"]:
    """With g = w·dy:   dx = r·(g − x·r²·mean(x·g))."""
    dx: Tensor = _RMS_NORM_BACKWARD(x.contiguous(), weight, scales, dy.contiguous())
    return dx


def gated_silu(gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """gate · σ(gate) · up; the first product is rounded before the second."""
    y: Tensor = _GATED_SILU(gate.contiguous(), up.contiguous())
    return y


def gated_silu_backward(
    gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"], dy: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """With s = σ(gate):   dgate = dy · up · s · (1 + gate·(1 − s)),  dup = dy · gate · s."""
    found: tuple[Tensor, Tensor] = _GATED_SILU_BACKWARD(gate.contiguous(), up.contiguous(), dy.contiguous())
    return found


def gelu(x: Float[Tensor, "*shape"], tanh: bool) -> Float[Tensor, "*shape"]:
    """x·Φ(x), with Φ exact or as `tanh` approximates it, off by at most 3e-5: for bf16."""
    y: Tensor = _GELU(x.contiguous(), tanh)
    return y


def gelu_backward(x: Float[Tensor, "*shape"], dy: Float[Tensor, "*shape"], tanh: bool) -> Float[Tensor, "*shape"]:
    """dx = dy · (x·Φ(x))′, which is off by at most 2e-4."""
    dx: Tensor = _GELU_BACKWARD(x.contiguous(), dy.contiguous(), tanh)
    return dx


def rotate(
    x: Float[Tensor, "tokens heads size"],
    cosines: Float[Tensor, "tokens size"],
    sines: Float[Tensor, "tokens size"],
    back: bool,
) -> Float[Tensor, "tokens heads size"]:
    """x · cos + [−x₂, x₁] · sin, with x₁ and x₂ the two halves of each head; `back` is its transpose."""
    y: Tensor = _ROTATE(x.contiguous(), cosines.contiguous(), sines.contiguous(), back)
    return y


class Codes(NamedTuple):
    """A quantised weight: the tensors of `weights.codec.Packed`, and what is needed to read them."""

    stored: Tensor
    scales: Tensor
    coarse: Tensor | None
    offset: Tensor | None
    map: Float[Tensor, "256"] | None
    """The levels of 8-bit scales."""
    levels: Float[Tensor, " levels"] | None
    """Those of codes of fewer bits."""
    block: int
    """Codes that share a scale."""
    bits: int
    """Of a code."""

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """All of them, in this order."""
        return self[:6]


def decode(codes: Codes, out: Float[Tensor, " numbers"], start: int) -> None:
    """level · scale in fp32 for each code from place `start` on, rounded once into `out`."""
    if not out.is_meta:
        _decode_loop(out, *codes.tensors, out, start, out.numel(), codes.block, codes.bits)


def cross_entropy_(
    logits: Float[Tensor, "rows classes"], targets: Int[Tensor, " rows"], units: int
) -> Float[Tensor, " rows"]:
    """log Σ exp z − z_target of each row z; (softmax(z) − one-hot) / units overwrites the logits, which are dense."""
    losses: Tensor = _CROSS_ENTROPY(logits, targets, units)
    return losses


def drop(x: Float[Tensor, "*shape"], p: float, seed: int) -> Float[Tensor, "*shape"]:
    """The elements of x, each zeroed with probability p (to within 2⁻¹⁶) or divided by 1 − p; a seed drops the same."""
    y: Tensor = _DROP(x.contiguous(), p, seed)
    return y


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    y, scales = torch.empty_like(x), torch.empty(len(x), dtype=torch.float32, device=x.device)
    if not x.is_meta:
        _rms_norm_loop(x, x, weight, epsilon, y, scales, *x.shape)
    return y, scales


def _rms_norm_backward(x: Tensor, weight: Tensor, scales: Tensor, dy: Tensor) -> Tensor:
    dx = torch.empty_like(x)
    if not x.is_meta:
        _rms_norm_backward_loop(x, x, weight, scales, dy, dx, *x.shape)
    return dx


def _gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty_like(gate)
    if not gate.is_meta:
        _gated_silu_loop(gate, gate, up, y, gate.numel())
    return y


def _gated_silu_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    if not gate.is_meta:
        _gated_silu_backward_loop(gate, gate, up, dy, dgate, dup, gate.numel())
    return dgate, dup


def _gelu(x: Tensor, tanh: bool) -> Tensor:
    y = torch.empty_like(x)
    if not x.is_meta:
        _gelu_loop(x, x, y, int(tanh), x.numel())
    return y


def _gelu_backward(x: Tensor, dy: Tensor, tanh: bool) -> Tensor:
    dx = torch.empty_like(x)
    if not x.is_meta:
        _gelu_backward_loop(x, x, dy, dx, int(tanh), x.numel())
    return dx


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor, back: bool) -> Tensor:
    y = torch.empty_like(x)
    if not x.is_meta:
        tokens, heads, size = x.shape
        _rotate_loop(x, x, cosines, sines, y, -1.0 if back else 1.0, tokens, heads, size // 2)
    return y


def _cross_entropy(logits: Tensor, targets: Tensor, units: int) -> Tensor:
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if not logits.is_meta:
        _cross_entropy_loop(logits, logits, targets, 1 / units, losses, *logits.shape)
    return losses


def _drop(x: Tensor, p: float, seed: int) -> Tensor:
    y = torch.empty_like(x)
    if not x.is_meta:
        _drop_loop(x, x, y, seed, round(p * 2**16), 1 / (1 - p), x.numel())
    return y


_rms_norm_loop = Loop("rms_norm", "ttfttnn")
_rms_norm_backward_loop = Loop("rms_norm_backward", "tttttnn")
_gated_silu_loop = Loop("gated_silu", "tttn")
_gated_silu_backward_loop = Loop("gated_silu_backward", "tttttn")
_gelu_loop = Loop("gelu", "ttnn")
_gelu_backward_loop = Loop("gelu_backward", "tttnn")
_rotate_loop = Loop("rotate", "ttttfnnn")
_decode_loop = Loop("decode", "tttttttnnnn")
_cross_entropy_loop = Loop("cross_entropy", "ttftnn")
_drop_loop = Loop("drop", "ttnnfn")

_RMS_NORM = operator("rms_norm(Tensor x, Tensor weight, float epsilon) -> (Tensor, Tensor)", _rms_norm)
_RMS_NORM_BACKWARD = operator(
    "rms_norm_backward(Tensor x, Tensor weight, Tensor scales, Tensor dy) -> Tensor", _rms_norm_backward
)
_GATED_SILU = operator("gated_silu(Tensor gate, Tensor up) -> Tensor", _gated_silu)
_GATED_SILU_BACKWARD = operator(
    "gated_silu_backward(Tensor gate, Tensor up, Tensor dy) -> (Tensor, Tensor)", _gated_silu_backward
)
_GELU = operator("gelu(Tensor x, bool tanh) -> Tensor", _gelu)
_GELU_BACKWARD = operator("gelu_backward(Tensor x, Tensor dy, bool tanh) -> Tensor", _gelu_backward)
_ROTATE = operator("rotate(Tensor x, Tensor cosines, Tensor sines, bool back) -> Tensor", _rotate)
_CROSS_ENTROPY = operator("cross_entropy_(Tensor(a!) logits, Tensor targets, int units) -> Tensor", _cross_entropy)
_DROP = operator("drop(Tensor x, float p, int seed) -> Tensor", _drop)
