"""New tokens of a language model: their vectors alone are new, train beside any method, and are saved and merged."""

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from transformers import PreTrainedModel

import deltatune
from conformance.cases import shaken
from deltatune import IA3, Head, LoRA, Prompt
from deltatune.errors import UserError
from deltatune.methods import Method
from deltatune.models.attach import trainable_parameters
from deltatune.models.base import Base
from deltatune.models.fingerprint import fingerprint
from deltatune.models.tokens import grow
from deltatune.training.saved import open_adapter
from tiny import VOCABULARY, save_tiny, save_tiny_language_model, tiny_language_model, tokenizer

TOKENS = ("<tool>", "<end>")
IDS = [VOCABULARY, VOCABULARY + 1]
METHODS = {"lora": LoRA(rank=2), "ia3": IA3(), "head": Head(), "prompt": Prompt(virtual_tokens=3)}
MODELS = {
    "llama": ("llama", True), "llama-untied": ("llama", False), "gpt2": ("gpt2", True),
    "t5": ("t5", True), "t5-untied": ("t5", False),
}  # fmt: skip
on_models = pytest.mark.parametrize(("architecture", "tied"), MODELS.values(), ids=MODELS.keys())
PAIRS = {f"{name}-lora": (*model, METHODS["lora"]) for name, model in MODELS.items()} | {
    f"llama-{name}": (*MODELS["llama"], method) for name, method in METHODS.items()
}
beside_methods = pytest.mark.parametrize(("architecture", "tied", "method"), PAIRS.values(), ids=PAIRS.keys())
Make = Callable[[str, bool], Base]


@pytest.fixture
def load() -> Make:
    """A tiny base with its tokenizer."""

    def make(architecture: str, tied: bool = True) -> Base:
        return Base(tiny_language_model(architecture, tied=tied), tokenizer(architecture), "tiny", "1")

    return make


def inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Texts with both new tokens; padded on the right."""
    ids = torch.tensor([[5, IDS[0], 9, 2], [IDS[1], 7, 2, 0]])
    both = {"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), **both}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(model)).logits


def is_tied(model: PreTrainedModel) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def trained(model: PreTrainedModel, method: Method) -> PreTrainedModel:
    return shaken(deltatune.attach(model, method))


@on_models
def test_the_vocabulary_grows_and_what_the_base_knew_stays(load: Make, architecture: str, tied: bool) -> None:
    plain, base = tiny_language_model(architecture, tied=tied), load(architecture, tied)
    deltatune.add_tokens(base, TOKENS)
    assert base.tokenizer("good <tool>film<end>", add_special_tokens=False).input_ids == [
        *base.tokenizer("good", add_special_tokens=False).input_ids, IDS[0],
        *base.tokenizer("film", add_special_tokens=False).input_ids, IDS[1],
    ]  # fmt: skip
    assert is_tied(base.model) == tied
    assert fingerprint(base.model) == fingerprint(plain)
    before = plain.state_dict()
    for name, value in base.model.state_dict().items():
        if name in before:
            assert torch.equal(value[: len(before[name])], before[name]), name
    known = {name: tensor.clamp(max=VOCABULARY - 1) for name, tensor in inputs(plain).items()}
    with torch.no_grad():
        old, new = plain(**known).logits, base.model(**known).logits
    torch.testing.assert_close(new[..., :VOCABULARY], old)
    assert new.shape[-1] == base.model.config.get_text_config().vocab_size == VOCABULARY + 2


@beside_methods
def test_the_new_vectors_train_beside_a_method_and_every_old_one_stays(
    load: Make, architecture: str, tied: bool, method: Method
) -> None:
    model = deltatune.attach(deltatune.add_tokens(load(architecture, tied), TOKENS).model, method)
    own = {name for name in trainable_parameters(model) if name.startswith("new_tokens.")}
    assert own == {"new_tokens.inputs"} | (set() if tied else {"new_tokens.outputs"})
    assert method.name != "head" or own == trainable_parameters(model).keys()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimiser = torch.optim.SGD(trainable_parameters(model).values(), lr=1.0)
    begin = logits(model)
    wanted = inputs(model).get("decoder_input_ids", inputs(model)["input_ids"]).contiguous()
    model(**inputs(model), labels=wanted).loss.backward()
    assert all(model.get_parameter(name).grad.abs().sum(1).all() for name in own)
    optimiser.step()
    assert not torch.allclose(logits(model), begin)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())


@beside_methods
def test_a_saved_adapter_lets_a_fresh_base_grow(
    load: Make, architecture: str, tied: bool, method: Method, tmp_path: Path
) -> None:
    model = trained(deltatune.add_tokens(load(architecture, tied), TOKENS).model, method)
    deltatune.save_adapter(model, tmp_path)
    saved = deltatune.read_adapter(tmp_path)
    assert saved.new_tokens == dict(zip(IDS, TOKENS, strict=True))
    loaded = deltatune.load_adapter(tiny_language_model(architecture, tied=tied), saved)
    assert torch.equal(logits(loaded), logits(model))
    assert is_tied(loaded) == tied
    with pytest.raises(UserError, match="trained on another base"):
        deltatune.load_adapter(tiny_language_model(architecture, tied=tied, seed=1), saved)


@on_models
def test_folding_gives_an_ordinary_model_with_the_whole_vocabulary(
    load: Make, architecture: str, tied: bool, tmp_path: Path
) -> None:
    model = trained(deltatune.add_tokens(load(architecture, tied), TOKENS).model, LoRA(rank=2))
    before = logits(model)
    deltatune.merge(model, inputs(model))
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
    deltatune.unmerge(model)
    folded = deltatune.fold(copy.deepcopy(model))
    assert torch.equal(logits(model), before)  # a copy has vectors of its own
    torch.testing.assert_close(logits(folded), before, atol=1e-4, rtol=1e-4)
    assert is_tied(folded) == tied
    assert not any("new_tokens" in name for name in folded.state_dict())
    folded.save_pretrained(tmp_path)
    again = type(folded).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_peft_reads_our_file_and_we_read_pefts(load: Make, tied: bool, tmp_path: Path) -> None:
    model = trained(deltatune.add_tokens(load("llama", tied), TOKENS).model, LoRA(rank=2))
    deltatune.save_adapter(model, tmp_path / "ours")
    fresh = tiny_language_model("llama", tied=tied)
    fresh.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-4, rtol=1e-4)

    layers = {"embed_tokens": IDS} if tied else {"embed_tokens": IDS, "lm_head": IDS}
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=layers, task_type="CAUSAL_LM")
    theirs = shaken(peft.get_peft_model(fresh, config).eval())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = deltatune.load_adapter(tiny_language_model("llama", tied=tied), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=1e-4)


def test_a_spare_row_of_the_base_is_used_first() -> None:
    """The embedding of many a base has more rows than its tokenizer has words."""
    model = tiny_language_model("llama")
    model.resize_token_embeddings(VOCABULARY + 5, mean_resizing=False)
    rows = model.get_input_embeddings().weight.clone()
    base = deltatune.add_tokens(Base(model, tokenizer("llama"), "tiny", "1"), TOKENS)
    assert torch.equal(base.model.get_input_embeddings().weight, rows)
    model = trained(base.model, Head())
    before = logits(model)
    assert before.shape[-1] == VOCABULARY + 5
    torch.testing.assert_close(logits(deltatune.fold(model)), before)


def test_an_opened_adapter_knows_the_new_tokens_by_name(tmp_path: Path) -> None:
    folder = str(save_tiny_language_model(tmp_path / "llama", "llama"))
    base = deltatune.add_tokens(deltatune.load(folder), TOKENS)
    model = trained(base.model, LoRA(rank=2))
    deltatune.save_adapter(model, tmp_path / "adapter", base=base.id, revision=base.revision)
    ready = open_adapter(tmp_path / "adapter", precision="fp32")
    assert ready.base.tokenizer("<tool>film<end>").input_ids == base.tokenizer("<tool>film<end>").input_ids
    torch.testing.assert_close(logits(ready.base.model), logits(model))


def test_a_tokenizer_may_come_to_know_the_tokens_of_a_loaded_adapter_later(load: Make, tmp_path: Path) -> None:
    deltatune.save_adapter(trained(deltatune.add_tokens(load("llama"), TOKENS).model, Head()), tmp_path)
    base = load("llama")
    deltatune.load_adapter(base.model, tmp_path)
    before = logits(base.model)
    deltatune.add_tokens(base, TOKENS)
    assert base.tokenizer(TOKENS[0] + TOKENS[1]).input_ids == IDS
    assert torch.equal(logits(base.model), before)


def test_adapters_with_the_same_new_tokens_stand_side_by_side(load: Make) -> None:
    model = trained(deltatune.add_tokens(load("llama"), TOKENS).model, LoRA(rank=2))
    first = logits(model)
    deltatune.attach(model, LoRA(rank=2), name="second")
    assert not torch.allclose(logits(model), first)
    assert torch.equal(logits(deltatune.activate(model, "default")), first)


def test_an_adapter_without_new_tokens_still_fits_a_base_that_has_some(load: Make, tmp_path: Path) -> None:
    plain = trained(tiny_language_model("llama"), LoRA(rank=2))
    deltatune.save_adapter(plain, tmp_path)
    loaded = deltatune.load_adapter(deltatune.add_tokens(load("llama"), TOKENS).model, tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits[..., :VOCABULARY], plain(ids).logits)


def test_what_cannot_be_added_is_refused(load: Make, tmp_path: Path) -> None:
    base = load("llama")
    for text, why in (("film", "it is a token already"), (" ", "it is empty")):
        with pytest.raises(UserError, match=why):
            deltatune.add_tokens(base, (text,))
    deltatune.add_tokens(deltatune.add_tokens(base, TOKENS), TOKENS)
    with pytest.raises(UserError, match="other new tokens already: <tool>, <end>"):
        deltatune.add_tokens(base, ("<other>",))
    with pytest.raises(UserError, match="BartForConditionalGeneration cannot take new tokens"):
        grow(tiny_language_model("bart"), IDS)
    attached = load("llama")
    deltatune.attach(attached.model, LoRA(rank=2))
    with pytest.raises(UserError, match="an adapter is attached"):
        deltatune.add_tokens(attached, TOKENS)
    classifier = deltatune.load(str(save_tiny(tmp_path / "bert", "bert")), labels=("a", "b"))
    with pytest.raises(UserError, match="need a language model"):
        deltatune.add_tokens(classifier, TOKENS)
