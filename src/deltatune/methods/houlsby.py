"""Houlsby's adapters: a bottleneck after each attention and each feed-forward sub-layer, before the residual is added.

Houlsby et al. 2019, arXiv 1902.00751, section 2.1 and figure 2.   h ← h + Up·σ(Down·h + a) + b

    x ──┬── attention ──┬───────────────────┬── + ── norm ──┬── feed-forward ──┬───────────────────┬── + ── norm ── …
        │               └── Down ── σ ── Up ┘   │           │                  └── Down ── σ ── Up ┘   │
        └───────────────────────────────────────┘           └──────────────────────────────────────────┘

Down is (m, d), Up (d, m), m = d / reduction: 2dm + m + d parameters each. The nonlinearity is that of the authors'
code, GELU. The paper begins with a narrower Gaussian (10⁻², cut off at two standard deviations), and trains the norms
as well. The adapter is over the linear layer that ends the sub-layer: dropout, where a model has it there, comes after.
"""

from dataclasses import dataclass
from typing import ClassVar

from deltatune.methods.bottleneck import Activation, Adapters, Init, in_range
from deltatune.methods.contract import CONFIG, Targets


@dataclass(frozen=True)
class Houlsby(Adapters):
    """Inserts a small trained network after each attention and each feed-forward sub-layer."""

    reduction: int = 16
    """How much narrower than the model the bottleneck is: m = d / reduction, rounded down."""
    activation: Activation = "gelu"
    """The nonlinearity: relu, gelu, silu or tanh."""
    init: Init = "normal"
    """First values: Down and Up N(0, 0.02²), near the base; or zero-up, which starts at the base itself."""
    scale: float = 1.0
    """Factor of what the adapter adds."""
    targets: Targets = ("attention-output", "mlp-down")
    """Layers that end the sub-layers: attention-output, mlp-down, module names or regular expressions."""
    leave_out: tuple[int, ...] = ()
    """Numbers of the blocks without an adapter, from 0; a decoder's blocks follow its encoder's."""

    name: ClassVar[str] = "houlsby"
    title: ClassVar[str] = "Houlsby's adapters"
    paper: ClassVar[str] = "arXiv 1902.00751"
    learning_rate: ClassVar[float] = 3e-3
    grows_by: ClassVar[str] = "reduction"
    peft_type: ClassVar[str] = "DELTATUNE_HOULSBY"
    __pydantic_config__ = CONFIG

    def __post_init__(self) -> None:
        in_range(self)
