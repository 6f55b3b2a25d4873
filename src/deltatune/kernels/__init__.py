"""What a training step does on a CPU, in compiled loops: passes over activations, attention, products.

They are there where the machine has a C compiler. Everybody who uses one asks `ready` (or `attends`, or `multiplies`)
first and has another way. They are operators of PyTorch's, so what watches those (a profiler, a plan) sees them too;
for weights in few bits `weights.codec` has the operators.
"""

from deltatune.kernels.attention import Sees, attends, attention, attention_backward
from deltatune.kernels.loops import missing, multiplies_pairs, ready, wide
from deltatune.kernels.passes import (
    Codes,
    cross_entropy_,
    decode,
    drop,
    gated_silu,
    gated_silu_backward,
    rms_norm,
    rms_norm_backward,
    rotate,
)
from deltatune.kernels.products import (
    Updated,
    low_rank,
    low_rank_backward,
    low_rank_output,
    magnified_low_rank_backward,
    multiplies,
    multiplies_codes,
    product,
    product_with_codes,
    scale_columns,
    scale_columns_backward,
    updated_norms,
)

__all__ = [
    "Codes",
    "Sees",
    "Updated",
    "attends",
    "attention",
    "attention_backward",
    "cross_entropy_",
    "decode",
    "drop",
    "gated_silu",
    "gated_silu_backward",
    "low_rank",
    "low_rank_backward",
    "low_rank_output",
    "magnified_low_rank_backward",
    "missing",
    "multiplies",
    "multiplies_codes",
    "multiplies_pairs",
    "product",
    "product_with_codes",
    "ready",
    "rms_norm",
    "rms_norm_backward",
    "rotate",
    "scale_columns",
    "scale_columns_backward",
    "updated_norms",
    "wide",
]
