"""How a run trains: everything that is not the base, the data or the method."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field

from deltatune.training.memory import MOST_KEPT
from deltatune.training.optimisers import Optimiser
from deltatune.training.pieces import Piece
from deltatune.training.precision import Precision


class Training(BaseModel):
    """Settings of a training run. The same for every method of a comparison, but for the learning rate."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    epochs: float = Field(2.0, gt=0)
    """Passes over the training split; parts of one are allowed."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate. Left out: the method's own."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""
    warmup: float = Field(0.06, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from 0."""
    optimiser: Optimiser = "adamw"
    """How AdamW keeps its two moments. adamw: in fp32; adamw8bit: in 8 bits, block by block; paged: in fp32 in mapped
    files, and on CUDA in bitsandbytes' paged memory, which the system can take back while memory is short."""
    paged_folder: Path | None = None
    """Where `paged` keeps its files off CUDA: a folder on a disk. Left out: the system's temporary folder."""
    batch_tokens: int = Field(1024, ge=1)
    """Tokens in a batch, padding included but no virtual tokens: its size follows the length of its examples."""
    accumulate: int = Field(1, ge=1)
    """Batches whose gradients are summed into one optimiser step."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's decay of matrices; vectors (biases, norms) do not decay."""
    clip: float = Field(1.0, ge=0)
    """Largest norm of the gradients together; 0 leaves them as they are."""
    max_length: int = Field(256, ge=2)
    """Longest example in tokens; the rest of a longer one is cut off, and counted."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time, the same result."""
    cache: ByteSize = Field(ByteSize(0), ge=0)
    """Room for what enters the lowest trained block, such as 1GB: kept in the first epoch, reused in the later ones."""
    cache_on: Literal["memory", "disk"] = "memory"
    """Where: disk is files in the system's folder for temporary ones (TMPDIR), mapped into memory."""
    heap: ByteSize = Field(ByteSize(MOST_KEPT), ge=0, le=MOST_KEPT)
    """Memory that a run on a CPU keeps between its steps instead of giving it back, such as 500MB: a step is faster."""
    plain: tuple[Piece, ...] = ()
    """Fast pieces of the step that plain ones stand for, to see what they are worth or to find a fault in one."""
    precision: Precision = "auto"
    """auto: bf16 where the machine has it in hardware, else fp32."""
    keep: Literal["best", "last"] = "best"
    """Which weights are kept: those best on validation, or the last."""
    evaluations: int = Field(2, ge=1)
    """Validations in each epoch, evenly spaced; the last step is always one."""
    patience: int = Field(0, ge=0)
    """Stop early after so many validations in a row that brought nothing better; 0 never does. The learning rate falls
    as if the run went on to its end."""
