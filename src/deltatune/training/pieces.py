"""The fast pieces of a step. Each stands for a plain one, gives the same to rounding, and can be left out alone.

| Piece | Instead of | Where |
|---|---|---|
| attention | Transformers' attention | texts that are short enough (`most_tokens`), on a CPU |
| dropout | `nn.Dropout` | on a CPU |
| gates | SiLU(gate) · up in three passes | where they are the architecture's, on a CPU |
| gelu | PyTorch's GELU | in bf16, on a CPU |
| norms | RMSNorm in half a dozen passes | where it is frozen, on a CPU |
| packing | padding | decoders whose attention is told where texts begin |
| pooled | all tokens in the last block | encoders that classify by the first token |
| products | PyTorch's products | frozen weights in bf16, on a CPU that multiplies pairs of bf16 |
| rotations | rotary positions in half a dozen passes | where the two halves of a head are turned, on a CPU |
| sharing | the beginning of each text by itself | packed texts that begin alike, with `attention` and no dropout |

"On a CPU" means for `gates`, `gelu`, `norms`, `products` and `rotations`: where the operators of `kernels` are. What
each is worth is measured by benchmarks/pieces.py.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Literal, get_args

from transformers import PreTrainedModel

from deltatune import kernels
from deltatune.dropout import replace_dropout
from deltatune.models.gates import replace_gates
from deltatune.models.gelu import replace_gelu
from deltatune.models.norms import replace_norms
from deltatune.models.products import replace_products
from deltatune.models.rotations import replace_rotations
from deltatune.training.attention import choose_attention

Piece = Literal[
    "attention", "dropout", "gates", "gelu", "norms", "packing", "pooled", "products", "rotations", "sharing"
]
PIECES: tuple[Piece, ...] = get_args(Piece)
FOR_A_CPU: tuple[Piece, ...] = ("attention", "dropout", "gates", "gelu", "norms", "products", "rotations")
"""The pieces that a run on another device goes without."""

COMPILED: Mapping[Piece, Callable[[PreTrainedModel], None]] = {
    "gates": replace_gates,
    "gelu": replace_gelu,
    "norms": replace_norms,
    "products": replace_products,
    "rotations": replace_rotations,
}
"""The pieces that need the operators of `kernels`, and what puts each into a model."""


def quicken(model: PreTrainedModel, longest: int, plain: Collection[Piece] = ()) -> None:
    """Puts the pieces that are modules of the model into it, for texts of at most `longest` tokens.

    Its weights stay the same tensors under the same names.
    """
    if "dropout" not in plain:
        replace_dropout(model)
    if model.device.type in ("cpu", "meta") and not kernels.missing():
        for piece, replace in COMPILED.items():
            if piece not in plain:
                replace(model)
    if "attention" not in plain:
        choose_attention(model, longest)
