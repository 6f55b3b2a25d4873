"""(IA)³: a trained vector scales what a layer puts out, or what goes into it.

Liu et al. 2022, arXiv 2205.05638, section 3.3: the keys, the values, and the input of an MLP's second layer are scaled.

    key, value:   y = l ⊙ (x·Wᵀ + b)     W' = diag(l)·W,  b' = l ⊙ b
    down:         y = (x ⊙ l)·Wᵀ + b     W' = W·diag(l)

Where queries, keys and values come from one matrix, as in GPT-2, the whole output is scaled, as in PEFT. The factors of
the queries add nothing then: q·k depends on the product of a query's factor and its key's alone.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltatune.methods.contract import CONFIG, Site, Targets, WeightDelta
from deltatune.weights import FrozenWeight


@dataclass(frozen=True)
class IA3(WeightDelta):
    """Scales keys, values and the inputs of MLPs' second layers by trained vectors."""

    scales: Literal["role", "input", "output"] = "role"
    """What a layer's vector scales: its input or its output. By role: the input of down layers, the others' output."""
    targets: Targets = ("attention-kv", "mlp-down")
    """Layers to adapt: attention-kv, mlp-down, all-linear, module names or regular expressions."""
    scales_pattern: Mapping[str, Literal["input", "output"]] = field(default_factory=dict)
    """What is scaled at some targets instead, such as {mlp-down: output}."""

    name: ClassVar[str] = "ia3"
    title: ClassVar[str] = "(IA)³"
    paper: ClassVar[str] = "arXiv 2205.05638"
    learning_rate: ClassVar[float] = 6e-2
    patterns: ClassVar[Mapping[str, str]] = {"scales_pattern": "scales"}
    peft_type: ClassVar[str] = "IA3"
    suffixes: ClassVar[Mapping[str, str]] = {"ia3_l": "factors"}
    __pydantic_config__ = CONFIG

    def scales_input(self, site: Site) -> bool:
        """Whether the site's vector scales its input; it scales the output otherwise."""
        return site.role == "down" if self.scales == "role" else self.scales == "input"

    def check(self, site: Site) -> None:
        """Every layer has an input and an output to scale."""

    def parameters(self, site: Site) -> int:
        """Trained parameters of one site: a factor for each input, or for each output."""
        return site.in_ if self.scales_input(site) else site.out

    def delta(
        self, site: Site, weight: FrozenWeight, shared: nn.Module | None, generator: torch.Generator
    ) -> "IA3Delta":
        """A fresh vector of ones."""
        return IA3Delta(self.parameters(site), self.scales_input(site))

    def stored(self, site: Site, delta: nn.Module) -> dict[str, Tensor]:
        """The factors as PEFT has them: a row (1, in) over the input, a column (out, 1) over the output."""
        assert isinstance(delta, IA3Delta)
        return {"ia3_l": delta.factors[None, :] if delta.scales_input else delta.factors[:, None]}

    def restore(self, delta: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Puts a row or a column of factors into a delta."""
        assert isinstance(delta, IA3Delta)
        delta.factors.copy_(tensors["ia3_l"].flatten())

    def to_peft(self, modules: Mapping[str, Any], deltas: Mapping[str, nn.Module]) -> dict[str, Any]:
        """PEFT's IA3Config fields; a regular expression tells the layers whose input is scaled."""
        inputs = [path for path, delta in deltas.items() if isinstance(delta, IA3Delta) and delta.scales_input]
        ends = {path.rpartition(".")[2] for path in inputs}
        others = {path.rpartition(".")[2] for path in deltas.keys() - set(inputs)}
        names = [rf"(?:.*\.)?{re.escape(end)}" for end in sorted(ends)]
        exact = names if ends.isdisjoint(others) else [re.escape(path) for path in inputs]
        return {"feedforward_modules": "|".join(exact) or [], "init_ia3_weights": True}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "IA3":
        """Reads PEFT's IA3Config fields: the layers that `feedforward_modules` names have their input scaled."""
        named = config.get("feedforward_modules") or []
        if not named:
            return cls(scales="output")
        # An expression is for the whole path, names are for its end, be it amid a word.
        ends = [re.escape(name) for name in named]
        pattern = rf"\A(?:{named})" if isinstance(named, str) else f".*(?:{'|'.join(sorted(ends))})"
        return cls(scales="output", scales_pattern={pattern: "input"})


class IA3Delta(nn.Module):
    """Factors over one frozen weight: (in) for its input, or (out) for its output."""

    def __init__(self, size: int, scales_input: bool) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.ones(size))
        self.scales_input = scales_input

    def merged(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """W with its columns or its rows scaled, in the type of W."""
        return (weight * (self.factors if self.scales_input else self.factors[:, None])).to(weight.dtype)

    def merged_bias(self, bias: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
        """The bias is part of the output, and scaled with it."""
        return bias if self.scales_input else (bias * self.factors).to(bias.dtype)

    def forward(
        self, x: Float[Tensor, "tokens in"], weight: FrozenWeight, bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "tokens out"]:
        """The same output from the plain product and one multiplication."""
        scaled = _ScaledInput if self.scales_input else _ScaledOutput
        y: Tensor = scaled.apply(x, weight, bias, self.factors.to(x.dtype))  # type: ignore[no-untyped-call]
        return y


class _ScaledInput(torch.autograd.Function):
    """y = (x ⊙ l)·Wᵀ + b.  Backward, with du = dy·W:   dx = du ⊙ l,  dl = Σ du ⊙ x,  db = Σ dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FrozenWeight, bias: Tensor | None, factors: Tensor) -> Tensor:
        ctx.save_for_backward(x, factors)
        ctx.weight = weight
        return weight.matmul(x * factors, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, factors = ctx.saved_tensors
        wants_x, _, wants_bias, _ = ctx.needs_input_grad
        du = ctx.weight.matmul_transposed(dy)
        dl = (du * x).sum(0)
        return du.mul_(factors) if wants_x else None, None, dy.sum(0) if wants_bias else None, dl


class _ScaledOutput(torch.autograd.Function):
    """y = l ⊙ z, z = x·Wᵀ + b.  Backward, with dz = dy ⊙ l:   dx = dz·W,  dl = Σ dy ⊙ z,  db = Σ dz."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FrozenWeight, bias: Tensor | None, factors: Tensor) -> Tensor:
        z = weight.matmul(x, bias)
        ctx.save_for_backward(z, factors)  # dividing y would not give z where a factor is 0
        ctx.weight = weight
        return z * factors

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, factors = ctx.saved_tensors
        wants_x, _, wants_bias, _ = ctx.needs_input_grad
        product = dy * z
        dl = product.sum(0)
        dz = torch.mul(dy, factors, out=product)
        dx = ctx.weight.matmul_transposed(dz) if wants_x else None
        return dx, None, dz.sum(0) if wants_bias else None, dl
