"""Pfeiffer's adapters: a bottleneck after each feed-forward sub-layer alone.

Pfeiffer et al. 2020, arXiv 2005.00247, section 3.1 and appendix A.   h ← h + Up·relu(Down·h + a) + b

    x ──┬── feed-forward ──┬──────────────────────┬── + ── norm ── …
        │                  └── Down ── relu ── Up ┘   │
        └─────────────────────────────────────────────┘

Half of Houlsby's adapters, found by a search over places. In the authors' post-norm models the adapter reads h after an
addition of x and a pass through the norm of their own; here it reads h itself, which every architecture has.
"""

from dataclasses import dataclass
from typing import ClassVar

from deltatune.methods.bottleneck import Activation, Adapters, Init, in_range
from deltatune.methods.contract import CONFIG, Targets


@dataclass(frozen=True)
class Pfeiffer(Adapters):
    """Inserts a small trained network after each feed-forward sub-layer."""

    reduction: int = 16
    """How much narrower than the model the bottleneck is: m = d / reduction, rounded down."""
    activation: Activation = "relu"
    """The nonlinearity: relu, gelu, silu or tanh."""
    init: Init = "normal"
    """First values: Down and Up N(0, 0.02²), near the base; or zero-up, which starts at the base itself."""
    scale: float = 1.0
    """Factor of what the adapter adds."""
    targets: Targets = "mlp-down"
    """Layers that end the sub-layers: mlp-down, attention-output, module names or regular expressions."""
    leave_out: tuple[int, ...] = ()
    """Numbers of the blocks without an adapter, from 0; a decoder's blocks follow its encoder's."""

    name: ClassVar[str] = "pfeiffer"
    title: ClassVar[str] = "Pfeiffer's adapters"
    paper: ClassVar[str] = "arXiv 2005.00247"
    learning_rate: ClassVar[float] = 3e-3
    grows_by: ClassVar[str] = "reduction"
    peft_type: ClassVar[str] = "DELTATUNE_PFEIFFER"
    __pydantic_config__ = CONFIG

    def __post_init__(self) -> None:
        in_range(self)
