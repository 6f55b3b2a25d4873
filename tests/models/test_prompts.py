"""Soft prompts and PEFT's files, both ways; what they begin with; and where an architecture has no place for them."""

from itertools import product
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

import deltatune
from conformance.cases import shaken
from conformance.test_soft_prompts import bare_model, output
from deltatune import Prefix, Prompt, PTuning
from deltatune.errors import UserError
from deltatune.files import write_json
from deltatune.methods import SoftPrompt
from deltatune.models.attach import attachment, trainable_parameters
from deltatune.models.count import count
from deltatune.models.places import find_base
from tiny import VOCABULARY, save_tiny, tiny_config, tiny_inputs, tiny_model

TASKS = {"t5": "SEQ_2_SEQ_LM", "bert": "FEATURE_EXTRACTION", "roberta": "FEATURE_EXTRACTION"}
"""PEFT's name of what `bare_model` makes; CAUSAL_LM where it is not named."""
CONFIGS = {
    "prompt": lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=5),
    "ptuning": lambda task: peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=5, encoder_hidden_size=8),
    "prefix": lambda task: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=5),
    "projected": lambda task: peft.PrefixTuningConfig(
        task_type=task, num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=8
    ),
}
LOADED_AS = {"prompt": Prompt(5), "ptuning": Prompt(5), "prefix": Prefix(5), "projected": Prefix(5)}
"""PEFT keeps what an encoder made, never the encoder."""
OURS = {
    "prompt": Prompt(5),
    "ptuning": PTuning(5, hidden=8),
    "lstm": PTuning(5, encoder="lstm", hidden=8),
    "prefix": Prefix(5),
    "projected": Prefix(5, projection=True, hidden=8),
}
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def output_of_peft(model: peft.PeftModel, architecture: str) -> torch.Tensor:
    """What `output` gives of ours: PEFT's, without what a model gives for virtual tokens and padding."""
    inputs = tiny_inputs()
    if architecture == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    with torch.no_grad():
        given = model.eval()(**inputs)[0]
    return given if architecture == "t5" else given[:, -7:][inputs["attention_mask"].bool()]


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        *product(("gpt2", "llama", "qwen2", "t5", "bert", "roberta"), ("prompt", "prefix")),
        *product(("gpt2", "t5"), ("ptuning", "projected")),
    ],
)
def test_an_adapter_of_peft_loads_here_and_gives_what_it_gives_there(
    architecture: str, kind: str, tmp_path: Path
) -> None:
    config = CONFIGS[kind](TASKS.get(architecture, "CAUSAL_LM"))
    theirs = shaken(peft.get_peft_model(bare_model(architecture), config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = deltatune.load_adapter(bare_model(architecture), tmp_path)
    assert attachment(ours).method == LOADED_AS[kind]
    torch.testing.assert_close(output(ours), output_of_peft(theirs, architecture), atol=1e-5, rtol=1e-5)
    assert (output(ours) - output(bare_model(architecture))).abs().max() > 0.1


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        *product(("gpt2", "llama", "qwen2", "t5", "bert"), ("prompt", "prefix")),
        *product(("gpt2", "t5"), ("ptuning", "lstm", "projected")),
    ],
)
def test_peft_loads_ours_and_what_it_saves_again_loads_here(architecture: str, kind: str, tmp_path: Path) -> None:
    ours = shaken(deltatune.attach(bare_model(architecture), OURS[kind]))
    deltatune.save_adapter(ours, tmp_path / "ours")
    if architecture == "t5" and OURS[kind].place == "attention":
        with pytest.raises(KeyError, match="DELTATUNE_PREFIX"):  # it gives two layers of a decoder one prefix
            peft.PeftModel.from_pretrained(bare_model(architecture), tmp_path / "ours")
        return
    theirs = peft.PeftModel.from_pretrained(bare_model(architecture), tmp_path / "ours")
    torch.testing.assert_close(output_of_peft(theirs, architecture), output(ours), atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = deltatune.load_adapter(bare_model(architecture), tmp_path / "theirs")
    torch.testing.assert_close(output(loaded), output(ours))


def test_a_classifier_and_its_head_go_to_peft_and_come_back(tmp_path: Path) -> None:
    """A prefix's. With virtual tokens at the input PEFT's BERT classifies by a virtual one, ours by [CLS]."""
    ours = shaken(deltatune.attach(tiny_model("bert"), Prefix(5)))
    deltatune.save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**tiny_inputs()).logits, output(ours))
    theirs.save_pretrained(tmp_path / "theirs")
    saved = deltatune.read_adapter(tmp_path / "theirs")
    assert saved.labels == ("0", "1", "2")
    torch.testing.assert_close(output(deltatune.load_adapter(tiny_model("bert"), saved)), output(ours))
    at_input = shaken(deltatune.attach(tiny_model("bert"), Prompt(5)))
    deltatune.save_adapter(at_input, tmp_path / "prompt")
    theirs = peft.PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "prompt").eval()
    with torch.no_grad():
        assert (theirs(**tiny_inputs()).logits - output(at_input)).abs().max() > 0.1


def test_a_prefix_on_a_model_without_a_cache_works_here_alone(tmp_path: Path) -> None:
    ours = shaken(deltatune.attach(tiny_model("distilbert"), Prefix(5)))
    assert (output(ours) - output(tiny_model("distilbert"))).abs().max() > 0.1
    deltatune.save_adapter(ours, tmp_path)
    assert torch.equal(output(deltatune.load_adapter(tiny_model("distilbert"), tmp_path)), output(ours))
    theirs = peft.PeftModel.from_pretrained(tiny_model("distilbert"), tmp_path)
    with pytest.raises(ValueError, match="does not support past key values"):
        theirs(**tiny_inputs())


@pytest.mark.parametrize("config", [{"peft_type": "PROMPT_TUNING"}, {"peft_type": "PREFIX_TUNING"}])
def test_a_configuration_without_a_number_of_virtual_tokens_is_refused(config: dict, tmp_path: Path) -> None:
    write_json(tmp_path / "adapter_config.json", config)
    save_file({"prompt_embeddings": torch.ones(5, 32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="num_virtual_tokens=None"):
        deltatune.read_adapter(tmp_path)


def test_a_prompt_begins_as_words_of_the_vocabulary() -> None:
    model = deltatune.attach(tiny_model("bert"), Prompt(30))
    words = model.get_input_embeddings().weight
    [prompt] = attachment(model).parts[0].trained()
    rows = [(words == row).all(1).nonzero().item() for row in prompt]
    assert len(set(rows)) > 10


def test_a_prompt_begins_as_a_text_repeated_or_cut_off() -> None:
    for tokens, ids in ((5, [7, 9, 4, 7, 9]), (2, [7, 9])):
        model = deltatune.attach(tiny_model("gpt2"), Prompt(tokens, init="text", token_ids=(7, 9, 4)))
        assert torch.equal(attachment(model).parts[0].trained()[0], model.get_input_embeddings().weight[ids])


def test_noise_is_of_the_size_of_the_vocabulary() -> None:
    model = deltatune.attach(tiny_model("bert"), Prompt(60, init="noise"))
    [prompt] = attachment(model).parts[0].trained()
    assert prompt.std().item() == pytest.approx(model.get_input_embeddings().weight.std().item(), rel=0.1)


def test_a_text_is_tokenised_in_training_and_asked_for_otherwise() -> None:
    method = Prompt(4, init="text", text="good film")
    assert method.tokenised(lambda text: [len(word) for word in text.split()]).token_ids == (4, 4)
    with pytest.raises(UserError, match="the text 'good film' has no token ids yet") as caught:
        deltatune.attach(tiny_model("bert"), method)
    assert "token_ids=tokenizer(" in caught.value.hint
    with pytest.raises(UserError, match="99 is no token of a vocabulary of"):
        deltatune.attach(tiny_model("bert"), Prompt(4, init="text", token_ids=(5, 99)))
    with pytest.raises(UserError, match="init=text needs a text"):
        Prompt(init="text")
    with pytest.raises(UserError, match="init=vocabulary uses no text"):
        Prompt(text="good film")


def other_model(kind: type, architecture: str, **options: object) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind.from_config(AutoConfig.for_model(architecture, **{**SIZES, **options})).eval()


REFUSED = {
    "vit-prompt": (
        Prompt(5), AutoModelForImageClassification, "vit", {"image_size": 8, "patch_size": 4}, "ViTModel takes no"
    ),
    "albert-prompt": (
        Prompt(5), AutoModelForSequenceClassification, "albert", {"embedding_size": 16}, "AlbertModel pools its first"
    ),
    "mamba-prompt": (Prompt(5), AutoModelForCausalLM, "mamba", {}, "MambaModel generates without a cache of keys"),
    "mamba-prefix": (Prefix(5), AutoModelForCausalLM, "mamba", {}, "in MambaModel nothing is known to make keys"),
    "deberta-prefix": (
        Prefix(5), AutoModelForSequenceClassification, "deberta-v2", {}, "DisentangledSelfAttention does not go through"
    ),
    "bart-prefix": (
        Prefix(5), AutoModelForSeq2SeqLM, "bart",
        {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 2},
        "BartDecoder counts positions by itself",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_an_architecture_without_a_place_for_it_is_refused_by_name(case: str) -> None:
    method, kind, architecture, options, why = REFUSED[case]
    model = other_model(kind, architecture, **options)
    before = model.state_dict().keys()
    with pytest.raises(UserError, match=why):
        deltatune.attach(model, method)
    assert model.state_dict().keys() == before
    assert not hasattr(model, "attachment")


def test_a_block_without_keys_and_a_layer_that_leaves_its_prefix_out_are_noticed() -> None:
    model = tiny_model("bert")
    model.bert.encoder.layer[1].attention = nn.Identity()
    with pytest.raises(UserError, match=r"the attention of its block encoder\.layer\.1"):
        deltatune.attach(model, Prefix(5))
    model = deltatune.attach(tiny_model("bert"), Prefix(5))
    model.bert.encoder.layer[1].attention.self.forward = lambda hidden, *_, **__: (hidden, None)
    with pytest.raises(UserError, match=r"layer\.1\.attention\.self did not use its prefix"):
        model(**tiny_inputs())


def test_a_model_that_is_none_of_transformers_is_refused() -> None:
    with pytest.raises(UserError, match="needs a model of Transformers, not a Linear"):
        deltatune.attach(nn.Linear(2, 2), Prompt(5), head=())


def test_a_prefix_works_on_images() -> None:
    model = other_model(AutoModelForImageClassification, "vit", image_size=8, patch_size=4)
    images = {"pixel_values": torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    plain = output(model, **images)
    shaken(deltatune.attach(model, Prefix(5))).train()(**images).logits.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in trainable_parameters(model).values())
    with deltatune.disabled(model.eval()):
        assert (output(model, **images) - plain).abs().max() > 1e-3  # its head is another now
    deltatune.detach(model)
    assert torch.equal(output(model, **images), plain)


@pytest.mark.parametrize("method", [Prompt(5), Prefix(5)], ids=["prompt", "prefix"])
def test_a_tagger_built_on_an_encoder_alone_labels_real_tokens(method: SoftPrompt) -> None:
    model = AutoModelForTokenClassification.from_config(tiny_config("t5")).eval()
    deltatune.attach(model, method)
    assert model(**tiny_inputs(), labels=tiny_inputs()["input_ids"] % 2).logits.shape == (3, 7, 2)


def test_a_prompt_and_its_text_may_have_types_and_positions_of_their_own() -> None:
    model = shaken(deltatune.attach(bare_model("bert"), Prompt(5)))
    inputs = tiny_inputs()
    types, positions = torch.ones(3, 7, dtype=torch.long), torch.arange(7)[None]
    assert torch.equal(output(model, **inputs, position_ids=positions), output(model))
    assert not torch.equal(output(model, **inputs, token_type_ids=types), output(model))
    embedded = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}
    assert torch.equal(output(model, **embedded, attention_mask=inputs["attention_mask"]), output(model))
    with torch.no_grad():
        assert model(**inputs, return_dict=False)[0].shape == (3, 7, 32)


def test_masks_and_caches_that_leave_no_room_are_refused() -> None:
    model = deltatune.attach(bare_model("llama"), Prompt(5))
    ids = tiny_inputs()["input_ids"]
    with pytest.raises(UserError, match="mask of 0 and 1 for each token"):
        model(input_ids=ids, attention_mask=torch.zeros(3, 1, 7, 7))
    with pytest.raises(UserError, match="a cache of fixed size"):
        model.generate(input_ids=ids, max_new_tokens=2, cache_implementation="static")
    with deltatune.disabled(model):
        cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(UserError, match="the attention mask has 8 tokens, the text and its cache have 3"):
        model(input_ids=ids[:, :1], attention_mask=torch.ones(3, 8, dtype=torch.long), past_key_values=cache)


def test_a_prefix_refuses_attention_functions_that_it_was_not_tested_with() -> None:
    model = deltatune.attach(bare_model("llama"), Prefix(5))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="works with the attention of eager, sdpa, deltatune_short, not with flash"):
        output(model)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_prefix_has_the_width_of_the_keys_that_queries_share(architecture: str, tmp_path: Path) -> None:
    base = find_base(str(save_tiny(tmp_path, architecture)))
    width = {"gpt2": 32, "llama": 16}[architecture]
    counted = count(base, Prefix(20), ("0", "1"))
    assert counted.trainable - counted.head == 20 * 2 * 2 * width
    assert counted.layers == 2
    projected = count(base, Prefix(20, projection=True, hidden=8), ("0", "1"))
    assert projected.trainable - projected.head == 20 * 32 + 33 * 8 + 9 * 2 * 2 * width
