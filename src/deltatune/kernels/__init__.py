"""What a training step does on a CPU, in compiled loops: passes over activations, attention, products.

They are there where the machine has a C compiler. Everybody who uses one asks `ready` (or `attends`, or `multiplies`)
first and has another way. They are operators of PyTorch's, so what watches those (a profiler, a plan) sees them too.
"""

from deltatune.kernels.attention import Sees, attends, attention, attention_backward
from deltatune.kernels.loops import missing, multiplies_pairs, ready, wide
from deltatune.kernels.low_rank import (
    Updated,
    low_rank,
    low_rank_backward,
    low_rank_output,
    magnified_low_rank_backward,
    scale_columns,
    scale_columns_backward,
    scaled_low_rank_backward,
    updated_norms,
)
from deltatune.kernels.passes import (
    Codes,
    cross_entropy_,
    decode,
    drop,
    gated_silu,
    gated_silu_backward,
    gelu,
    gelu_backward,
    rms_norm,
    rms_norm_backward,
    rotate,
)
from deltatune.kernels.products import (
    HIGHEST_RANK,
    PRODUCTS,
    Coded,
    Factor,
    Magnified,
    magnified_product,
    multiplies,
    multiplies_codes,
    product,
)

__all__ = [
    "HIGHEST_RANK",
    "PRODUCTS",
    "Coded",
    "Codes",
    "Factor",
    "Magnified",
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
    "gelu",
    "gelu_backward",
    "low_rank",
    "low_rank_backward",
    "low_rank_output",
    "magnified_low_rank_backward",
    "magnified_product",
    "missing",
    "multiplies",
    "multiplies_codes",
    "multiplies_pairs",
    "product",
    "ready",
    "rms_norm",
    "rms_norm_backward",
    "rotate",
    "scale_columns",
    "scale_columns_backward",
    "scaled_low_rank_backward",
    "updated_norms",
    "wide",
]
