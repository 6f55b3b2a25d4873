"""The laws of a soft prompt, for every registered one on tiny models of every architecture."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, DynamicCache, PreTrainedModel

import deltatune
from conformance.cases import PROMPTS, bits, shaken
from deltatune.errors import UserError
from deltatune.files import read_json, write_json
from deltatune.methods import METHODS, SoftPrompt
from deltatune.models.adapters import TENSORS
from deltatune.models.attach import attachment, find_head, trainable_parameters
from deltatune.models.count import count
from deltatune.models.fingerprint import fingerprint
from deltatune.models.places import find_base
from tiny import ARCHITECTURES, DECODERS, save_tiny, tiny_config, tiny_inputs, tiny_language_model, tiny_model

PLAIN = {name: method for name, method in PROMPTS.items() if "," not in name}
AT_INPUT = {name: method for name, method in PROMPTS.items() if method.place == "input"}
ENCODERS = ("bert", "roberta", "distilbert")
GENERATORS = (*DECODERS, "t5")
LABELS = torch.tensor([0, 1, 2])
every_prompt = pytest.mark.parametrize("method", PROMPTS.values(), ids=PROMPTS.keys())
plain_prompt = pytest.mark.parametrize("method", PLAIN.values(), ids=PLAIN.keys())


def on_models(methods: dict[str, SoftPrompt], architectures: tuple[str, ...]) -> pytest.MarkDecorator:
    """Every method on every one of these architectures; variants of a method on the first alone."""
    pairs = {
        f"{architecture}-{name}": (architecture, method)
        for name, method in methods.items()
        for architecture in (architectures[:1] if "," in name else architectures)
    }
    return pytest.mark.parametrize(("architecture", "method"), pairs.values(), ids=pairs.keys())


def bare_model(architecture: str) -> PreTrainedModel:
    """A tiny language model; of an encoder the base model, without any head."""
    if architecture not in ENCODERS:
        return tiny_language_model(architecture)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModel.from_config(tiny_config(architecture)).eval()


def trained(
    architecture: str, method: SoftPrompt, make: Callable[[str], PreTrainedModel] = tiny_model
) -> PreTrainedModel:
    """The tiny base with the method, its parameters shaken as if it had been trained."""
    return shaken(deltatune.attach(make(architecture), method))


def output(model: PreTrainedModel, **inputs: torch.Tensor) -> torch.Tensor:
    """The logits, of a base model the hidden states; where there are some for each token, those of padding left out."""
    inputs = inputs or tiny_inputs()
    if type(model).__name__ == "T5ForConditionalGeneration":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    with torch.no_grad():
        given = model(**inputs)
    wanted = given.last_hidden_state if "last_hidden_state" in given else given.logits
    per_token = "attention_mask" in inputs and wanted.shape[:2] == inputs["attention_mask"].shape
    return wanted[inputs["attention_mask"].bool()] if per_token else wanted


def padded_on_the_left() -> dict[str, torch.Tensor]:
    inputs = tiny_inputs()
    lengths = inputs["attention_mask"].sum(1)
    return {
        name: torch.stack([row.roll(7 - int(length)) for row, length in zip(tensor, lengths, strict=True)])
        for name, tensor in inputs.items()
    }


def step(model: PreTrainedModel) -> None:
    model.zero_grad()
    model(**tiny_inputs(), labels=LABELS).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved base of each architecture."""
    place = tmp_path_factory.mktemp("bases")
    return {architecture: save_tiny(place / architecture, architecture) for architecture in ARCHITECTURES}


@every_prompt
def test_the_start_is_that_of_its_seed_and_not_the_base(method: SoftPrompt) -> None:
    first, again, other = (output(deltatune.attach(tiny_model("bert"), method, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert torch.equal(first, other) == bool(getattr(method, "token_ids", ()))  # a text is the same for every seed
    assert (first - output(tiny_model("bert"))).abs().max() > 1e-3


@on_models(PROMPTS, ARCHITECTURES)
def test_only_the_prompt_and_the_head_train_and_are_as_many_as_counted(
    architecture: str, method: SoftPrompt, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = deltatune.attach(tiny_model(architecture, labels=2), method).train()
    counted = count(find_base(str(folders[architecture])), method, ("0", "1"))
    trains = trainable_parameters(model)
    assert counted.trainable == sum(p.numel() for p in trains.values())
    assert counted.total == sum(p.numel() for p in model.parameters())
    deltatune.save_adapter(model, tmp_path / "a")
    assert counted.stored == sum(t.numel() for t in load_file(tmp_path / "a" / TENSORS).values())
    before = bits(model)
    model(**tiny_inputs(), labels=LABELS % 2).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trains.keys()
    assert all(p.grad.abs().max() > 0 for p in trains.values()), "some of it, or of a layer's, was not used"
    torch.optim.SGD(trains.values(), lr=0.1).step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == trains.keys()


@on_models(AT_INPUT, (*ENCODERS, *DECODERS))
def test_the_text_sees_virtual_tokens_in_front_as_the_plain_base_does(architecture: str, method: SoftPrompt) -> None:
    """[P; X] given to the plain base as embeddings, without any hook of ours."""
    model, plain = trained(architecture, method, bare_model), bare_model(architecture).base_model
    inputs = tiny_inputs()
    with torch.no_grad():
        virtual = attachment(model).parts[0].stored()["prompt_embeddings"].expand(3, -1, -1)
        embedded = torch.cat([virtual, plain.get_input_embeddings()(inputs["input_ids"])], 1)
        mask = torch.cat([torch.ones(3, method.virtual_tokens, dtype=torch.long), inputs["attention_mask"]], 1)
        wanted = plain(inputs_embeds=embedded, attention_mask=mask).last_hidden_state[:, method.virtual_tokens :]
        found = model.base_model(**inputs, output_hidden_states=True)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found.last_hidden_state[real], wanted[real])
    assert all(hidden.shape == wanted.shape for hidden in found.hidden_states)


@pytest.mark.parametrize("architecture", DECODERS)
def test_a_prefix_is_a_cache_that_was_there_before_the_text(architecture: str) -> None:
    """Keys and values given to the plain base as a cache, without any attention function of ours."""
    method = PROMPTS["prefix"]
    model, plain = trained(architecture, method, bare_model), bare_model(architecture)
    heads = getattr(plain.config, "num_key_value_heads", 4)
    flat = attachment(model).parts[0].stored()["prompt_embeddings"].detach()
    keys_and_values = flat.view(5, 2, 2, heads, 8).permute(1, 2, 3, 0, 4)[:, :, None].expand(-1, -1, 3, -1, -1, -1)
    inputs = tiny_inputs()
    mask = torch.cat([torch.ones(3, 5, dtype=torch.long), inputs["attention_mask"]], 1)
    cache = DynamicCache([tuple(layer) for layer in keys_and_values])
    with torch.no_grad():
        wanted = plain(input_ids=inputs["input_ids"], attention_mask=mask, past_key_values=cache).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(output(model), wanted[real])


@on_models(PLAIN, ("bert", "distilbert", "llama", "t5"))
def test_both_attention_functions_give_the_same(architecture: str, method: SoftPrompt) -> None:
    model = trained(architecture, method)
    outputs = []
    for chosen in ("sdpa", "eager"):
        model.set_attn_implementation(chosen)
        outputs.append(output(model))
        outputs.append(output(model, input_ids=tiny_inputs()["input_ids"][:1]))  # without a mask
    torch.testing.assert_close(outputs[0], outputs[2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs[1], outputs[3], atol=1e-4, rtol=1e-4)


@on_models(PLAIN, ("bert", "roberta", "gpt2", "llama"))
def test_padding_on_the_left_gives_what_padding_on_the_right_does(architecture: str, method: SoftPrompt) -> None:
    model = trained(architecture, method, bare_model)
    right, left = tiny_inputs(), padded_on_the_left()
    with torch.no_grad():
        found = model.base_model(**left).last_hidden_state[left["attention_mask"].bool()]
        wanted = model.base_model(**right).last_hidden_state[right["attention_mask"].bool()]
        alone = model.base_model(input_ids=right["input_ids"][2:, :2]).last_hidden_state[0]
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found[-2:], alone)


@on_models(PLAIN, GENERATORS)
def test_generation_with_a_cache_gives_the_tokens_of_generation_without(architecture: str, method: SoftPrompt) -> None:
    model = trained(architecture, method, bare_model)
    model.set_attn_implementation("eager" if architecture == "gpt2" else "sdpa")
    inputs = tiny_inputs() if architecture == "t5" else padded_on_the_left()
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    told = {"return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(**inputs, **options, **told)
    assert torch.equal(cached.sequences, model.generate(**inputs, **options, use_cache=False))
    with deltatune.disabled(model):
        bare = model.generate(**inputs, **options, **told)
        assert not torch.allclose(cached.logits[0], bare.logits[0], atol=1e-3)
    alone = model.generate(input_ids=tiny_inputs()["input_ids"][1:2, :5], **options)
    assert torch.equal(alone[0, -5:], cached.sequences[1, -5:])


@plain_prompt
def test_virtual_positions_carry_no_loss(method: SoftPrompt) -> None:
    model = trained("llama", method, bare_model)
    inputs = tiny_inputs()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        given = model(**inputs, labels=labels)
    loss = nn.functional.cross_entropy(given.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(given.loss, loss)


@on_models(PLAIN, ("bert", "distilbert", "gpt2"))
def test_a_classifier_pools_a_real_token(architecture: str, method: SoftPrompt) -> None:
    model = trained(architecture, method)
    inputs = tiny_inputs()
    with torch.no_grad():
        hidden = model.base_model(**inputs).last_hidden_state
        last = inputs["attention_mask"].sum(1) - 1
        pooled = {
            "bert": lambda: model.classifier(model.bert.pooler.dense(hidden[:, 0]).tanh()),
            "distilbert": lambda: model.classifier(model.pre_classifier(hidden[:, 0]).relu()),
            "gpt2": lambda: model.score(hidden[torch.arange(3), last]),
        }[architecture]()
    assert hidden.shape[1] == 7
    torch.testing.assert_close(output(model), pooled)


@on_models(PROMPTS, ("bert", "gpt2", "t5"))
def test_a_disabled_prompt_is_the_base_and_a_detached_one_is_gone(architecture: str, method: SoftPrompt) -> None:
    plain = tiny_model(architecture)
    model = deltatune.attach(tiny_model(architecture), method)
    before = output(model)
    with deltatune.disabled(model):
        assert torch.equal(output(model), output(plain))
    assert torch.equal(output(model), before)
    assert not torch.equal(before, output(plain))
    assert fingerprint(model) == fingerprint(plain)
    deltatune.detach(model)
    assert torch.equal(output(model), output(plain))
    assert model.state_dict().keys() == plain.state_dict().keys()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in plain.modules()]
    assert not any(hasattr(module, "prefix") for module in model.modules())


@plain_prompt
def test_several_stand_side_by_side_with_a_weight_delta(method: SoftPrompt) -> None:
    model = trained("bert", method)
    alone = output(model)
    deltatune.attach(model, method, name="second", seed=1)
    second = output(shaken(model, seed=5))
    deltatune.attach(model, deltatune.LoRA(rank=2), name="third")
    third = output(shaken(model, seed=6))
    for name, wanted in (("default", alone), ("second", second), ("third", third)):
        deltatune.activate(model, name)
        assert torch.equal(output(model), wanted)
    deltatune.detach(model, "second")
    deltatune.activate(model, "default")
    assert torch.equal(output(model), alone)


@on_models(PROMPTS, ("bert", "gpt2", "t5"))
def test_gradient_checkpointing_changes_nothing(architecture: str, method: SoftPrompt) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = trained(architecture, method).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.config.use_cache = False
        torch.manual_seed(0)
        model(**tiny_inputs(), labels=LABELS).loss.backward()
        return {name: p.grad for name, p in trainable_parameters(model).items()}

    plain, checkpointed = gradients(False), gradients(True)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@every_prompt
def test_a_copied_model_has_a_prompt_of_its_own(method: SoftPrompt) -> None:
    model = trained("bert", method)
    before, twin = output(model), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(output(twin), before)


@on_models(PLAIN, ("bert", "llama", "t5"))
def test_a_16_bit_base_computes_in_its_type_and_the_prompt_trains_in_32(architecture: str, method: SoftPrompt) -> None:
    model = trained(architecture, method, lambda name: tiny_model(name, dtype=torch.bfloat16)).train()
    given = model(**tiny_inputs(), labels=LABELS)
    given.loss.backward()
    assert given.logits.dtype == torch.bfloat16
    own = attachment(model).parts[0].trained()
    assert all(p.dtype == torch.float32 and p.grad.abs().max() > 0 for p in own)


@on_models(PROMPTS, ("bert", "t5"))
def test_a_loaded_prompt_is_the_same_to_the_bit_and_trains_on_as_if_never_saved(
    architecture: str, method: SoftPrompt, tmp_path: Path
) -> None:
    model = deltatune.attach(tiny_model(architecture), method)
    step(model)
    deltatune.save_adapter(model, tmp_path / "adapter", base="tiny")
    loaded = deltatune.load_adapter(tiny_model(architecture), tmp_path / "adapter")
    assert torch.equal(output(loaded), output(model))
    assert attachment(loaded).method == method
    step(model)
    step(loaded)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


@plain_prompt
def test_a_saved_prompt_refuses_another_base_and_damaged_files(method: SoftPrompt, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    deltatune.save_adapter(trained("bert", method), folder, base="tiny")
    with pytest.raises(UserError, match="trained on another base"):
        deltatune.load_adapter(tiny_model("bert", seed=1), folder)
    whole = load_file(folder / TENSORS)
    record = read_json(folder / "deltatune.json")

    def refused(tensors: dict[str, torch.Tensor], why: str) -> None:
        save_file(tensors, folder / TENSORS)
        write_json(folder / "deltatune.json", {**record, "sha256": {}})
        with pytest.raises(UserError, match=why):
            deltatune.load_adapter(tiny_model("bert"), folder)

    some = "prompt_embeddings"
    refused({name: tensor for name, tensor in whole.items() if name != some}, f"lacks {some}")
    refused({**whole, "prompt_stranger": torch.ones(2)}, "unknown tensor, prompt_stranger")
    refused({**whole, some: torch.ones(3, 3)}, f"{some} has shape")
    refused({**whole, some: whole[some].fill_(torch.nan)}, f"{some} has values that are not finite")


@plain_prompt
def test_it_does_not_merge_and_says_why(method: SoftPrompt) -> None:
    model = trained("bert", method)
    before = output(model)
    for merging in (deltatune.merge, deltatune.fold):
        with pytest.raises(UserError, match=f"{method.name} cannot be merged: it adds virtual tokens"):
            merging(model)
    assert torch.equal(output(model), before)


@pytest.mark.parametrize("name", PLAIN)
def test_bad_hyperparameters_are_named(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: virtual_tokens must be at least 1, not 0"):
        METHODS[name](virtual_tokens=0)


@plain_prompt
def test_more_virtual_tokens_than_there_is_room_for_are_refused_with_the_number_that_fits(
    method: SoftPrompt, folders: dict[str, Path]
) -> None:
    many = replace(method, virtual_tokens=64)
    with pytest.raises(UserError, match="64 virtual tokens leave no room for a text") as caught:
        deltatune.attach(tiny_model("roberta"), many)
    assert caught.value.hint == "at most 63 virtual tokens fit"  # that leaves two of 65 for the text
    with pytest.raises(UserError, match="no room"):
        count(find_base(str(folders["roberta"])), many, ("0", "1"))
    most = trained("roberta", replace(method, virtual_tokens=63))
    assert output(most, input_ids=torch.tensor([[5, 2]])).isfinite().all()


def test_the_head_of_a_model_is_found_as_if_nothing_were_attached() -> None:
    for method in PLAIN.values():
        model = deltatune.attach(tiny_model("bert"), method)
        assert find_head(model) == ("classifier",)
