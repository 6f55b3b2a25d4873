"""Root mean square norms on a CPU, a few rows at a time: what lies between reading and writing them stays in its cache.

Zhang & Sennrich 2019, arXiv 1910.07467, equation 4. Transformers' norms make half a dozen tensors of the input's size
in fp32, forward and backward; each is fetched from memory and put back. Here only the result is.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

_AT_ONCE = 2**16
"""Elements that are computed together: some hundred kilobytes in fp32."""


class RMSNorm(nn.Module):
    """w · x / √(mean(x²) + ε) over the last dimension; computed in fp32, rounded to the type of x before w."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self.epsilon = epsilon

    def forward(self, x: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape width"]:
        """The same shape and, of a frozen weight in that type, the type of x."""
        if self.weight.requires_grad or x.device.type != "cpu":
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)).to(x.dtype)
        normed: Tensor = _Normed.apply(x.reshape(-1, x.shape[-1]), self.weight, self.epsilon)  # type: ignore[no-untyped-call]
        return normed.view(x.shape)


class _Normed(torch.autograd.Function):
    """With r = 1 / √(mean(x²) + ε) and g = w·dy:   dx = r·(g − x·r²·mean(x·g))."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Float[Tensor, "rows width"],
        weight: Float[Tensor, " width"],
        epsilon: float,
    ) -> Float[Tensor, "rows width"]:
        wide = torch.promote_types(x.dtype, torch.float32)
        y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
        scales = torch.empty(len(x), 1, dtype=wide)
        parts = _parts(x)
        rows = torch.empty(parts, x.shape[1], dtype=wide)
        for start in range(0, len(x), parts):
            here = slice(start, start + parts)
            now = rows[: len(x[here])].copy_(x[here])
            torch.rsqrt(torch.linalg.vecdot(now, now)[:, None].div_(x.shape[1]).add_(epsilon), out=scales[here])
            torch.mul(now.mul_(scales[here]).to(x.dtype), weight, out=y[here])
        ctx.save_for_backward(x, scales, weight)
        return y

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx,
        *gradients: Float[Tensor, "rows width"],
    ) -> tuple[Float[Tensor, "rows width"], None, None]:
        (dy,) = gradients
        x, scales, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        dx = torch.empty_like(x)
        parts = _parts(x)
        rows, products = torch.empty(2, parts, x.shape[1], dtype=scales.dtype)
        for start in range(0, len(x), parts):
            here = slice(start, start + parts)
            now, r = rows[: len(x[here])].copy_(x[here]), scales[here]
            g = products[: len(now)].copy_(dy[here] * weight)
            shared = torch.linalg.vecdot(now, g)[:, None].mul_(r).mul_(r).div_(x.shape[1])
            dx[here] = g.addcmul_(now, shared, value=-1).mul_(r)
        return dx, None, None


def _parts(x: Tensor) -> int:
    """Rows that are computed together: all of them where there are no numbers to compute."""
    return len(x) if x.is_meta else max(1, min(len(x), _AT_ONCE // x.shape[1]))


@torch.no_grad()
def replace_norms(model: nn.Module) -> None:
    """Puts `RMSNorm` in the place of every frozen norm on a CPU that gives what it gives, by whatever name.

    In an outline, which has no numbers to try it with, those of Gemma are known to give something else.
    """
    for path, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not ("RMSNorm" in type(module).__name__ or type(module).__name__ == "T5LayerNorm") or epsilon is None:
            continue
        if not isinstance(weight, nn.Parameter) or weight.requires_grad or weight.device.type not in ("cpu", "meta"):
            continue
        norm = RMSNorm(weight, epsilon).train(module.training)
        if "Gemma" not in type(module).__name__ if weight.is_meta else _same(norm, module):
            model.set_submodule(path, norm)


def _same(norm: RMSNorm, module: nn.Module) -> bool:
    x = torch.linspace(-2, 3, 3 * len(norm.weight), dtype=norm.weight.dtype).view(1, 3, -1)
    return torch.allclose(norm(x), module(x), rtol=0.01, atol=1e-5)
