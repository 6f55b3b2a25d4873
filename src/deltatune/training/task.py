"""What a base is trained for: how its examples are encoded, what is lost on them, and how well it does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from deltatune.data.batches import Batch
from deltatune.training.generation import Decoding


class Examples(Protocol):
    """One split as token ids."""

    @property
    def truncated(self) -> int:
        """How many examples were longer than the limit and lost a part."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Scores:
    """How well a model does on a split."""

    metric: str
    """Which of the figures counts most."""
    figures: Mapping[str, float]
    """Over the whole split, by name, `loss` among them: mean cross-entropy in nats."""
    values: list[float]
    """The metric of each example, in the split's order; comparisons are paired by them."""
    outputs: list[dict[str, Any]] = field(default_factory=list)
    """What the model said of each example, where it says something besides a loss."""
    variants: Mapping[str, str] = field(default_factory=dict)
    """Of the figures that come in several variants, which one it is."""

    @property
    def quality(self) -> float:
        """The metric over the whole split."""
        return self.figures[self.metric]

    @property
    def loss(self) -> float:
        """Mean cross-entropy, in nats."""
        return self.figures["loss"]

    @property
    def rank(self) -> tuple[float, ...]:
        """Larger is better: by the metric, then by loss."""
        return (-self.loss,) if self.metric == "loss" else (self.quality, -self.loss)


class Task(Protocol):
    """A task on one model, which computes in the precision of the run."""

    model: PreTrainedModel

    def encode(self, split: Any, limit: int) -> Examples:
        """The split as token ids, at most `limit` each."""

    def collate(self, examples: Any, places: Sequence[int]) -> Batch:
        """The examples at `places` as padded tensors."""

    def run(self, batch: Batch) -> Tensor:
        """What the model gives for a batch: its logits."""

    def backward(self, batch: Batch, units: int) -> float:
        """Adds the gradients of the batch's losses, summed and divided by `units`, and gives that quotient."""

    def evaluate(self, examples: Any) -> Scores:
        """Scores the model with dropout off; each module is left in the mode it was in."""

    def test(self, split: Any, limit: int, decoding: Decoding) -> Scores:
        """How well the model does on the test split, by the metric that methods are compared by."""
