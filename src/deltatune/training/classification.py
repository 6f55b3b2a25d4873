"""Classifying texts: cross-entropy of one label for each example; accuracy, macro-F1 and calibration."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from deltatune.data.batches import Batch, by_length, collate
from deltatune.data.examples import Split
from deltatune.data.tokens import Tokens, tokenize
from deltatune.models.base import Base
from deltatune.training.generation import Decoding
from deltatune.training.modes import SCORED_TOKENS, evaluating
from deltatune.training.packing import length_step
from deltatune.training.precision import Computed, autocast
from deltatune.training.task import Scores


class Classification:
    """A classifier and the labels of its examples."""

    def __init__(self, base: Base, precision: Computed) -> None:
        self.model = base.model
        self._tokenizer = base.tokenizer
        self._precision = precision

    def encode(self, split: Split, limit: int) -> Tokens:
        """The texts as token ids; what is longer than `limit` is cut at the end."""
        return tokenize(split, self._tokenizer, limit)

    def collate(self, examples: Tokens, places: Sequence[int]) -> Batch:
        """The examples at `places`, padded on the right."""
        return collate(examples, places, self.model.config.pad_token_id, length_step(self.model))

    def run(self, batch: Batch) -> Float[Tensor, "examples labels"]:
        """The logits."""
        inputs = {name: tensor.to(self.model.device) for name, tensor in batch.inputs.items()}
        with autocast(self._precision, self.model.device):
            logits: Tensor = self.model(**inputs).logits
        return logits

    def backward(self, batch: Batch, units: int) -> float:
        """Adds the gradients of the examples' cross-entropies, summed and divided by `units`; gives that quotient."""
        logits = self.run(batch)
        loss = F.cross_entropy(logits.float(), batch.labels.to(self.model.device), reduction="sum") / units
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def evaluate(self, examples: Tokens) -> Scores:
        """Loss, accuracy, macro-F1 (F1 of each class that occurs, averaged with equal weight) and calibration error."""
        from sklearn.metrics import f1_score

        logits = torch.empty(len(examples), self.model.config.num_labels)
        with evaluating(self.model):
            for places in by_length(examples.lengths, SCORED_TOKENS):
                logits[places] = self.run(self.collate(examples, places)).float().cpu()
        labels = torch.tensor(examples.labels)
        predictions, sure = logits.argmax(1), logits.softmax(1).amax(1)
        right = predictions == labels
        figures = {
            "accuracy": right.double().mean().item(),
            "macro_f1": float(f1_score(labels, predictions, average="macro")),
            "calibration_error": calibration_error(sure, right),
            "loss": F.cross_entropy(logits, labels).item(),
        }
        outputs = [
            {"label": label, "prediction": said, "probability": round(probability, 4)}
            for label, said, probability in zip(labels.tolist(), predictions.tolist(), sure.tolist(), strict=True)
        ]
        return Scores("accuracy", figures, right.double().tolist(), outputs)

    def test(self, split: Split, limit: int, _: Decoding) -> Scores:
        """Loss, accuracy, macro-F1 and calibration error."""
        return self.evaluate(self.encode(split, limit))


def calibration_error(
    confidence: Float[Tensor, " examples"], right: Bool[Tensor, " examples"], bins: int = 15
) -> float:
    """The expected calibration error of answers given with these probabilities (arXiv 1706.04599, equation 3).

    Of as many bins of equal width over [0, 1] the mean of |accuracy − mean probability|, weighed by their examples; a
    bin has its upper bound in it. 0 where answers are right as often as their probability says.
    """
    bin_of = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, right.double() - confidence.double())
    return gaps.abs().sum().item() / len(confidence)
