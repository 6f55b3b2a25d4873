"""Every weight delta on a decoder whose output layer is its embedding: grouped queries, ties kept, PEFT agrees."""

from pathlib import Path

import peft
import pytest
import torch
from transformers import PreTrainedModel

import deltatune
from conformance.cases import DELTAS, shaken
from deltatune.methods import WeightDelta
from tiny import tiny_inputs, tiny_language_model

PLAIN = {name: method for name, method in DELTAS.items() if "," not in name}
every_delta = pytest.mark.parametrize("method", PLAIN.values(), ids=PLAIN.keys())


def decoder() -> PreTrainedModel:
    """A tiny Qwen-style language model with tied embeddings and two query heads to a key head."""
    return tiny_language_model("qwen2")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_inputs()).logits


def is_tied(model: PreTrainedModel) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


@every_delta
def test_ties_survive_attaching_merging_and_unmerging(method: WeightDelta) -> None:
    model = shaken(deltatune.attach(decoder(), method))
    before, embedding = logits(model), model.get_input_embeddings().weight.clone()
    assert model.attachment.head == ()
    merged = deltatune.merge(model, tiny_inputs())
    assert merged.difference < 1e-3 * before.abs().max()
    assert is_tied(deltatune.unmerge(model))
    assert torch.equal(logits(model), before)
    folded = deltatune.fold(model)
    assert is_tied(folded)
    assert torch.equal(folded.get_output_embeddings().weight, embedding)


@every_delta
def test_peft_gives_the_same_logits(method: WeightDelta, tmp_path: Path) -> None:
    model = shaken(deltatune.attach(decoder(), method))
    deltatune.save_adapter(model, tmp_path)
    assert torch.equal(logits(deltatune.load_adapter(decoder(), tmp_path)), logits(model))
    if not method.peft_type.startswith("DELTATUNE_"):
        theirs = peft.PeftModel.from_pretrained(decoder(), tmp_path).eval()
        torch.testing.assert_close(logits(theirs), logits(model), atol=1e-4, rtol=1e-4)
