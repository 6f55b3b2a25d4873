"""Scoring a classifier on a split: loss, accuracy and macro-F1 over every example once."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from deltatune.data.batches import sorted_batches
from deltatune.data.tokens import Tokens
from deltatune.training.precision import Computed, autocast


@dataclass(frozen=True)
class Scores:
    """How well a model does on a split."""

    loss: float
    """Mean cross-entropy over the examples, in nats."""
    accuracy: float
    macro_f1: float
    """F1 of each class that occurs, averaged with equal weight."""
    labels: list[int]
    predictions: list[int]
    probabilities: list[float]
    """Of each prediction, by softmax."""


def evaluate(model: PreTrainedModel, tokens: Tokens, precision: Computed, batch_tokens: int = 4096) -> Scores:
    """Scores `model` on `tokens` with dropout off; each module is left in the mode it was in."""
    from sklearn.metrics import f1_score

    training = {module: module.training for module in model.modules()}
    model.eval()
    device = model.device
    logits = torch.empty(len(tokens), model.config.num_labels)
    try:
        with torch.inference_mode(), autocast(precision, device):
            for batch in sorted_batches(tokens, batch_tokens, model.config.pad_token_id):
                inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
                logits[list(batch.indices)] = model(**inputs).logits.float().cpu()
    finally:
        for module, was in training.items():
            module.training = was
    labels = torch.tensor(tokens.labels)
    predictions = logits.argmax(1)
    return Scores(
        loss=F.cross_entropy(logits, labels).item(),
        accuracy=(predictions == labels).double().mean().item(),
        macro_f1=float(f1_score(labels, predictions, average="macro")),
        labels=labels.tolist(),
        predictions=predictions.tolist(),
        probabilities=logits.softmax(1).amax(1).tolist(),
    )
