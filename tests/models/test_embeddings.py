"""Adapters over embeddings, alone and where the embedding is tied to the output layer."""

from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import deltatune
from conformance.cases import bits, shaken
from deltatune import LoRA
from deltatune.errors import UserError
from deltatune.models.adapters import CONFIG
from deltatune.models.attach import adapted_layers
from tiny import tiny_inputs, tiny_language_model, tiny_model

EVERYTHING = LoRA(rank=3, alpha=4.0, targets=("all-linear", "embeddings"))
pytestmark = [  # PEFT says so when it saves an embedding whole, and when one of a tied pair is adapted
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
on_three_models = pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama"])
on_four_models = pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama", "t5"])
on_both = pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_inputs()).logits


def is_tied(model: PreTrainedModel) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


@on_four_models
def test_training_starts_at_the_base_and_every_embedding_reaches_the_output(architecture: str) -> None:
    model = deltatune.attach(tiny_model(architecture), EVERYTHING)
    torch.testing.assert_close(logits(model), logits(tiny_model(architecture)))
    embeddings = [layer for layer in adapted_layers(model).values() if layer.site.embedding]
    assert len(embeddings) == (2 if architecture == "t5" else 1)
    for layer in embeddings:
        before = logits(model)
        shaken(layer.delta)
        assert not torch.allclose(logits(model), before, atol=1e-3)


@on_three_models
def test_merging_gives_the_adapted_output_and_unmerging_the_bits(architecture: str) -> None:
    model = shaken(deltatune.attach(tiny_model(architecture), EVERYTHING))
    before, weights = logits(model), bits(model)
    deltatune.merge(model)
    assert not torch.equal(model.get_input_embeddings().weight, tiny_model(architecture).get_input_embeddings().weight)
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
    deltatune.unmerge(model)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(logits(deltatune.fold(model)), before, atol=1e-4, rtol=1e-4)


@on_four_models
def test_ours_loads_here_and_in_peft_and_what_peft_saves_loads_here(architecture: str, tmp_path: Path) -> None:
    model = shaken(deltatune.attach(tiny_model(architecture), EVERYTHING))
    deltatune.save_adapter(model, tmp_path / "ours")
    assert torch.equal(logits(deltatune.load_adapter(tiny_model(architecture), tmp_path / "ours")), logits(model))
    theirs = peft.PeftModel.from_pretrained(tiny_model(architecture), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-4, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    again = deltatune.load_adapter(tiny_model(architecture), tmp_path / "theirs")
    torch.testing.assert_close(logits(again), logits(model))


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [("bert", ["word_embeddings", "query"]), ("gpt2", ["wte"]), ("llama", ["embed_tokens", "q_proj"])],
)
def test_an_adapter_that_peft_made_over_an_embedding_gives_its_logits_here(
    architecture: str, targets: list[str], tmp_path: Path
) -> None:
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=6, use_rslora=True, target_modules=targets)
    theirs = shaken(peft.get_peft_model(tiny_model(architecture), config)).eval()
    theirs.save_pretrained(tmp_path)
    model = deltatune.load_adapter(tiny_model(architecture), tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)


def test_an_embedding_that_peft_saved_whole_has_to_be_the_base_s(tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["embed_tokens"])
    theirs = peft.get_peft_model(tiny_model("llama"), config)
    with torch.no_grad():
        theirs.get_input_embeddings().weight.add_(1)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="embed_tokens"):
        deltatune.load_adapter(tiny_model("llama"), tmp_path)


def test_several_adapters_may_stand_over_one_embedding() -> None:
    model = shaken(deltatune.attach(tiny_model("gpt2"), EVERYTHING, name="a"), seed=1)
    first = logits(model)
    shaken(deltatune.attach(model, LoRA(rank=2, targets="embeddings"), name="b"), seed=2)
    assert not torch.equal(logits(model), first)
    assert torch.equal(logits(deltatune.activate(model, "a")), first)
    assert torch.equal(logits(deltatune.activate(model, None)), logits(tiny_model("gpt2")))


@on_both
def test_merging_an_embedding_that_is_tied_to_the_output_is_refused_by_name(architecture: str) -> None:
    model = shaken(deltatune.attach(tiny_language_model(architecture), EVERYTHING, head=()))
    before, weights = logits(model), bits(model)
    with pytest.raises(UserError, match="lm_head") as caught:
        deltatune.merge(model)
    assert "tied" in caught.value.message
    assert torch.equal(logits(model), before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    deltatune.merge(shaken(deltatune.attach(tiny_language_model(architecture, tied=False), EVERYTHING, head=())))


@on_both
def test_a_tied_model_keeps_its_tie(architecture: str, tmp_path: Path) -> None:
    linear = LoRA(rank=2)
    for method in (linear, EVERYTHING):
        model = shaken(deltatune.attach(tiny_language_model(architecture), method, head=()))
        assert is_tied(model)
        model.tie_weights()  # Transformers' own, which it calls where it pleases
        assert is_tied(model)
        deltatune.save_adapter(model, tmp_path / "adapter")
        loaded = deltatune.load_adapter(tiny_language_model(architecture), tmp_path / "adapter")
        assert is_tied(loaded)
        assert torch.equal(logits(loaded), logits(model))
        theirs = peft.PeftModel.from_pretrained(tiny_language_model(architecture), tmp_path / "adapter").eval()
        torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-5)
        assert is_tied(deltatune.detach(loaded))
    model = shaken(deltatune.attach(tiny_language_model(architecture), linear, head=()))
    output, weights = logits(model), bits(model)
    deltatune.merge(model)
    assert is_tied(model)
    deltatune.unmerge(model)
    assert is_tied(model)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    folded = deltatune.fold(model)
    assert is_tied(folded)
    folded.save_pretrained(tmp_path / "folded")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    assert is_tied(whole)
    torch.testing.assert_close(logits(whole), output, atol=1e-4, rtol=1e-4)


@on_both
def test_the_config_says_which_layers_are_stored_the_other_way_round(architecture: str, tmp_path: Path) -> None:
    deltatune.save_adapter(deltatune.attach(tiny_language_model(architecture), EVERYTHING, head=()), tmp_path)
    assert ('"fan_in_fan_out": true' in (tmp_path / CONFIG).read_text()) == (architecture == "gpt2")
