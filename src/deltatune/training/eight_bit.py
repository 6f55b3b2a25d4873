"""AdamW whose moments take 8 bits a number (Dettmers et al. 2021, 8-bit Optimizers via Block-wise Quantization).

arXiv 2110.02861: each moment is cut into blocks of 256 numbers, and a block keeps its largest magnitude in fp32 and a
byte for each number, its place in the dynamic map: signed for the first moment, unsigned for the second. A step decodes
them, runs AdamW's own kernel in fp32, and encodes them again, a few blocks at a time and in the same memory, so that a
whole moment never stands in fp32. With its scale a number takes 1 + 4/256 bytes instead of 4.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from deltatune.weights import dynamic_map

BLOCK = 256
"""Numbers that share a scale."""
SMALLEST = 4096
"""Elements from which on a tensor's moments are 8-bit. Smaller ones hold biases and norms and would save little."""
_CHUNK = {"cpu": 1 << 17}
"""Elements decoded at a time: on a CPU what stays in a core's cache."""
_OTHER_CHUNK = 1 << 22
"""Elsewhere: few launches, and at most some tens of megabytes besides."""


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with decoupled decay (arXiv 1711.05101) and block-wise 8-bit moments.

    The hyperparameters are those of `torch.optim.AdamW`. A state dict holds the moments as they are, in bytes: what is
    loaded goes on bit by bit.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step for every parameter that has a gradient; gives what `closure`, if there is one, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scratch: dict[torch.device, _Scratch] = {}
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            self._step_small([parameter for parameter in trained if parameter.numel() < SMALLEST], group)
            for parameter in trained:
                if parameter.numel() >= SMALLEST:
                    if parameter.device not in scratch:
                        scratch[parameter.device] = _Scratch(_chunk(parameter.device), parameter.device)
                    self._step_large(parameter, group, scratch[parameter.device])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a copy of what `state_dict()` gave; PyTorch's own would turn the bytes into floats."""
        super().load_state_dict({**state_dict, "state": {}})
        saved = (key for group in state_dict["param_groups"] for key in group["params"])
        for key, parameter in zip(saved, _parameters(self), strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                self.state[parameter][name] = value.to(parameter.device, copy=True)

    def _step_small(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        first, second, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = group["betas"]
        adamw(
            parameters,  # type: ignore[arg-type]
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            first, second, [], steps,
            fused=True, amsgrad=False, maximize=False,
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip

    def _step_large(self, parameter: nn.Parameter, group: dict[str, Any], scratch: "_Scratch") -> None:
        state = self.state[parameter]
        if not state:
            blocks = -(-parameter.numel() // BLOCK)
            state["step"] = torch.zeros((), device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros(blocks, BLOCK, dtype=torch.uint8, device=parameter.device)
                state[f"{name}_absmax"] = torch.zeros(blocks, device=parameter.device)
        state["step"] += 1
        assert parameter.grad is not None
        weights = parameter.detach().contiguous()
        for weight, gradient, part in _chunks(weights.view(-1), parameter.grad.reshape(-1)):
            _update(weight, gradient, {name: state[name][part] for name in _MOMENTS}, state["step"], group, scratch)
        if weights.data_ptr() != parameter.data_ptr():
            parameter.copy_(weights)


class _Scratch(dynamic_map.Scratch):
    """Memory for a few blocks of both moments, and what decoding and encoding them takes."""

    def __init__(self, numbers: int, device: torch.device) -> None:
        super().__init__(numbers, device)
        self.first, self.second = torch.empty(numbers, device=device), torch.empty(numbers, device=device)


_MOMENTS = ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")


def _chunk(device: torch.device) -> int:
    return _CHUNK.get(device.type, _OTHER_CHUNK)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _chunks(
    weights: Float[Tensor, " numbers"], gradients: Float[Tensor, " numbers"]
) -> Iterator[tuple[Float[Tensor, "blocks block"], Float[Tensor, "blocks block"], slice]]:
    """Weights and gradients a few whole blocks at a time, and which blocks these are.

    A last block that is short is filled up with zeros; the weights that were yielded are then copied back.
    """
    size = _chunk(weights.device)
    whole = weights.numel() // BLOCK * BLOCK
    for start in range(0, whole, size):
        stop = min(start + size, whole)
        blocks = slice(start // BLOCK, stop // BLOCK)
        yield weights[start:stop].view(-1, BLOCK), gradients[start:stop].view(-1, BLOCK), blocks
    if short := weights.numel() - whole:
        last = F.pad(weights[whole:], (0, BLOCK - short))
        yield last[None], F.pad(gradients[whole:], (0, BLOCK - short))[None], slice(whole // BLOCK, None)
        weights[whole:] = last[:short]


def _update(
    weight: Float[Tensor, "blocks block"],
    gradient: Float[Tensor, "blocks block"],
    moments: dict[str, Tensor],
    step: Float[Tensor, ""],
    group: dict[str, Any],
    scratch: _Scratch,
) -> None:
    """One step of AdamW on a few blocks, in place; the moments are those of `_MOMENTS`."""
    beta1, beta2 = group["betas"]
    first, second = (part[: weight.numel()].view(weight.shape) for part in (scratch.first, scratch.second))
    dynamic_map.decode_(moments["exp_avg"], moments["exp_avg_absmax"], first, scratch, signed=True)
    dynamic_map.decode_(moments["exp_avg_sq"], moments["exp_avg_sq_absmax"], second, scratch, signed=False)
    torch._fused_adamw_(
        [weight], [gradient.float()], [first], [second], [], [step],
        lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
        amsgrad=False, maximize=False,
    )  # fmt: skip
    dynamic_map.encode_(first, moments["exp_avg"], moments["exp_avg_absmax"], scratch, signed=True)
    dynamic_map.encode_(second, moments["exp_avg_sq"], moments["exp_avg_sq_absmax"], scratch, signed=False)
