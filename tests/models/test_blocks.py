"""Block inserts on whole models: one after, or beside, every sub-layer that the method means, or a refusal by name."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

import deltatune
from conformance.cases import INSERTS, shaken
from deltatune import Houlsby, LoRA, Parallel, Pfeiffer
from deltatune.errors import UserError
from deltatune.methods import BlockInsert
from deltatune.models.attach import adapted_layers, trainable_parameters
from tiny import ARCHITECTURES, tiny_images, tiny_inputs, tiny_model

PLAIN = {name: method for name, method in INSERTS.items() if "," not in name}
every_insert = pytest.mark.parametrize("method", PLAIN.values(), ids=PLAIN.keys())
on_every_architecture = pytest.mark.parametrize("architecture", [*ARCHITECTURES, "vit"])

ATTENTION = {"t5": 2 + 2 * 2}
"""Attention sub-layers: one in each of two blocks, and in T5 two in each of two more."""
FEED_FORWARD = {"t5": 4}
BEGIN = {
    "bert": "intermediate.dense",
    "roberta": "intermediate.dense",
    "distilbert": "ffn.lin1",
    "gpt2": "mlp.c_fc",
    "llama": "mlp.up_proj",
    "qwen2": "mlp.up_proj",
    "t5": "DenseReluDense.wi",
    "vit": "mlp.fc1",
}
"""The layer that takes in a feed-forward sub-layer."""


MIXTURE = {
    **{"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_labels": 3},
    **{"num_key_value_heads": 2, "intermediate_size": 64, "num_local_experts": 2},
}
"""Of a decoder whose feed-forward sub-layers are several that share one large parameter."""


def output(model: PreTrainedModel) -> Tensor:
    inputs = tiny_images() if model.config.model_type == "vit" else tiny_inputs()
    return model(**inputs).logits


def standing(model: nn.Module) -> dict[str, nn.Module]:
    return {path: layer.delta for path, layer in adapted_layers(model).items() if layer.delta is not None}


def shared(path: str, other: str) -> int:
    """The characters at the start that two paths have in common."""
    return next((place for place, pair in enumerate(zip(path, other, strict=False)) if pair[0] != pair[1]), len(path))


def by_hand(architecture: str, method: BlockInsert, inserts: dict[str, nn.Module]) -> PreTrainedModel:
    """The plain model with hooks that add each insert's plain formula to what comes out of a layer."""
    plain = tiny_model(architecture)
    begins = [path for path, _ in plain.named_modules() if path.endswith(BEGIN[architecture])]
    went_in: dict[str, Tensor] = {}

    def add(insert: nn.Module, begin: str, h: Tensor) -> Tensor:
        read = went_in[begin] if method.beside else h
        return h + insert.added(read.flatten(0, -2)).view(h.shape)

    for begin in begins:
        plain.get_submodule(begin).register_forward_pre_hook(
            lambda _, inputs, begin=begin: went_in.__setitem__(begin, inputs[0])
        )
    for path, insert in inserts.items():
        begin = max(begins, key=lambda other, path=path: shared(path, other))
        plain.get_submodule(path).register_forward_hook(
            lambda _, __, h, insert=insert, begin=begin: add(insert, begin, h)
        )
    return plain


@every_insert
@on_every_architecture
def test_every_sub_layer_has_its_insert_and_the_model_is_the_one_made_by_hand(
    architecture: str, method: BlockInsert
) -> None:
    model = shaken(deltatune.attach(tiny_model(architecture), method, head=()))
    inserts = standing(model)
    wanted = FEED_FORWARD.get(architecture, 2)
    if "attention-output" in method.targets:
        wanted += ATTENTION.get(architecture, 2)
    assert len(inserts) == wanted
    plain = by_hand(architecture, method, inserts)
    ours, theirs = output(model), output(plain)
    # T5 does not scale its attention scores, so rounding grows on its way.
    close = {"rtol": 1e-3, "atol": 1e-3} if architecture == "t5" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(ours, theirs, **close)
    assert not torch.allclose(ours, output(tiny_model(architecture)), atol=1e-2)
    trained = list(trainable_parameters(model).values())
    outward = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    for one, other in zip(
        torch.autograd.grad(ours, trained, outward), torch.autograd.grad(theirs, trained, outward), strict=True
    ):
        assert (one - other).norm() <= 1e-3 * other.norm()


@pytest.mark.parametrize(
    ("architecture", "begin"), [("llama", "mlp.up_proj"), ("t5", "DenseReluDense.wi_1"), ("bert", "intermediate.dense")]
)
def test_one_that_stands_beside_reads_what_the_sub_layer_is_given(architecture: str, begin: str) -> None:
    options = {"feed_forward_proj": "gated-gelu"} if architecture == "t5" else {}
    model = deltatune.attach(tiny_model(architecture, **options), Parallel())
    assert {path for path, layer in adapted_layers(model).items() if layer.shows} == {
        path for path, _ in tiny_model(architecture, **options).named_modules() if path.endswith(begin)
    }


@every_insert
def test_blocks_that_are_left_out_get_none_and_a_decoder_s_are_counted_after_its_encoder_s(method: BlockInsert) -> None:
    model = deltatune.attach(tiny_model("t5"), replace(method, leave_out=(0, 3)))
    assert {".".join(path.split(".")[1:4]) for path in standing(model)} == {"encoder.block.1", "decoder.block.0"}


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (Houlsby(leave_out=(2,)), "leave_out has 2, and the model has 2 blocks"),
        (Pfeiffer(leave_out=(0, 1)), "leaves no block"),
        (Pfeiffer(targets="query"), "query: pfeiffer stands where a sub-layer ends"),
        (Parallel(targets="attention-output"), "no layer of the role up or gate is known"),
        (Houlsby(reduction=33), "reduction 33 leaves nothing of a width of 32"),
    ],
)
def test_what_cannot_be_is_refused_and_the_model_left_alone(method: BlockInsert, why: str) -> None:
    model = tiny_model("bert")
    before = set(model.state_dict())
    with pytest.raises(UserError, match=why):
        deltatune.attach(model, method)
    assert set(model.state_dict()) == before


@pytest.mark.parametrize(
    ("architecture", "sub_layer", "end", "role", "where"),
    [
        ("bert", "bert.encoder.layer.1.output", "dense", "down", "bert.encoder.layer.1"),
        ("gpt2", "transformer.h.0.attn", "c_proj", "attention-output", "transformer.h.0"),
        (
            "t5",
            "transformer.decoder.block.1.layer.1.EncDecAttention",
            "o",
            "attention-output",
            "decoder.block.1.layer.1",
        ),
    ],
)
def test_a_sub_layer_whose_end_is_not_known_is_named_and_nothing_is_attached(
    architecture: str, sub_layer: str, end: str, role: str, where: str
) -> None:
    model = tiny_model(architecture, **({"intermediate_size": 48} if architecture == "bert" else {}))
    parent = model.get_submodule(sub_layer)
    parent.wrapped = nn.ModuleDict({"inner": getattr(parent, end)})  # the same layer under a name that says nothing
    delattr(parent, end)
    before = set(model.state_dict())
    with pytest.raises(UserError, match=f"{where} has the role {role}") as caught:
        deltatune.attach(model, Houlsby())
    assert "name in targets" in caught.value.hint
    assert set(model.state_dict()) == before


def test_a_mixture_of_experts_is_refused_by_the_role_that_it_lacks() -> None:
    experts = AutoConfig.for_model("mixtral", **MIXTURE)
    model = AutoModelForSequenceClassification.from_config(experts)
    with pytest.raises(UserError, match="'mlp-down' matches no layer of this Mixtral"):
        deltatune.attach(model, Pfeiffer())


def test_experts_beside_a_shared_one_are_not_passed_over() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.experts = nn.Module()
    with pytest.raises(UserError, match="experts is a mixture of experts"):
        deltatune.attach(model, Houlsby())
    deltatune.attach(model, Houlsby(targets="attention-output"))


def test_an_insert_beside_stands_with_other_adapters_over_the_layer_it_reads() -> None:
    alone = shaken(deltatune.attach(tiny_model("llama"), Parallel()), seed=2)
    lora = LoRA(rank=2, targets="mlp")
    only_lora = shaken(deltatune.attach(tiny_model("llama"), lora), seed=1)
    for first in ("a", "b"):
        model = tiny_model("llama")
        for name in sorted("ab", reverse=first == "b"):
            deltatune.attach(model, Parallel() if name == "b" else lora, name=name)
            shaken(model, seed=2 if name == "b" else 1)
        for name, wanted in (("b", alone), ("a", only_lora), ("b", alone)):
            assert torch.equal(output(deltatune.activate(model, name)), output(wanted))
        deltatune.detach(model, "a")
        assert torch.equal(output(model), output(alone))
        twin = shaken(copy.deepcopy(model), seed=7)
        assert torch.equal(output(model), output(alone))
        assert not torch.equal(output(twin), output(alone))
        deltatune.detach(model, "b")
        assert torch.equal(output(model), output(tiny_model("llama")))
        assert not adapted_layers(model)
    assert all(layer.beside is None for layer in adapted_layers(alone).values() if layer.shows), "nothing is left over"
