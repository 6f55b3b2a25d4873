"""Parallel adapters: a bottleneck beside each feed-forward sub-layer, which reads what goes into it.

He et al. 2021, arXiv 2110.04366, the scaled parallel adapter of section 3.3.   f(x) + s·(Up·relu(Down·x + a) + b)

    x ──┬────── feed-forward ──────┬── …       Down is (m, d), Up (d, m), m = d / reduction
        └── Down ── relu ── Up·s ──┘

Down starts Kaiming-uniform and Up at 0, so training starts at the base. What goes into the sub-layer is what its first
linear layer (`up`, or `gate`) is given; in models that normalise before the sub-layer that is the normalised x.
"""

from dataclasses import dataclass
from typing import ClassVar

from deltatune.methods.bottleneck import Activation, Adapters, Init, in_range
from deltatune.methods.contract import CONFIG, Targets


@dataclass(frozen=True)
class Parallel(Adapters):
    """Adds a small trained network beside each feed-forward sub-layer."""

    reduction: int = 2
    """How much narrower than the model the bottleneck is: m = d / reduction, rounded down."""
    activation: Activation = "relu"
    """The nonlinearity: relu, gelu, silu or tanh."""
    init: Init = "zero-up"
    """First values: zero-up, which starts at the base; or normal, Down and Up N(0, 0.02²), near it."""
    scale: float = 4.0
    """Factor of what the adapter adds."""
    targets: Targets = "mlp-down"
    """Layers that end the feed-forward sub-layers: mlp-down, module names or regular expressions."""
    leave_out: tuple[int, ...] = ()
    """Numbers of the blocks without an adapter, from 0; a decoder's blocks follow its encoder's."""

    name: ClassVar[str] = "parallel"
    title: ClassVar[str] = "Parallel adapters"
    paper: ClassVar[str] = "arXiv 2110.04366"
    learning_rate: ClassVar[float] = 1e-3
    grows_by: ClassVar[str] = "reduction"
    beside: ClassVar[bool] = True
    peft_type: ClassVar[str] = "DELTATUNE_PARALLEL"
    __pydantic_config__ = CONFIG

    def __post_init__(self) -> None:
        in_range(self)
