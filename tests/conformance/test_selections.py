"""What selections select on each architecture, by formulas of their own, and the laws that are theirs alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

import deltatune
from conformance.cases import SELECTIONS, bits, shaken
from deltatune import BitFit, Full, LastK, LoRA, Norms, Select
from deltatune.errors import UserError
from deltatune.methods import Method, Selection
from deltatune.models.adapters import TENSORS
from deltatune.models.attach import trainable_parameters
from deltatune.models.blocks import stacks
from deltatune.models.count import count
from deltatune.models.places import find_base
from deltatune.models.roles import linear_roles
from deltatune.training.checkpointing import checkpointing
from deltatune.training.precision import autocast, prepare
from tiny import ARCHITECTURES, save_tiny, tiny_inputs, tiny_language_model, tiny_model

TWO_STACKS = ("t5",)
NO_BIASES = ("llama", "t5")
LABELS = torch.tensor([0, 1, 2])


def selected(architecture: str, method: Selection) -> set[str]:
    """The names of what trains on the tiny model besides its head."""
    model = deltatune.attach(tiny_model(architecture), method)
    head = tuple(f"{path}." for path in model.attachment.head)
    return {name for name in trainable_parameters(model) if not name.startswith(head)}


def parameters(architecture: str, of: Callable[[str, nn.Module], bool]) -> set[str]:
    """The names of the base's own parameters whose module, by name and type, is of that kind."""
    model = tiny_model(architecture)
    return {
        f"{model.base_model_prefix}.{path}.{name}"
        for path, module in model.base_model.named_modules()
        if of(path, module)
        for name, _ in module.named_parameters(recurse=False)
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_norms_are_all_modules_that_normalise_and_nothing_else(architecture: str) -> None:
    found = selected(architecture, Norms())
    kinds = ("LayerNorm", "RMSNorm")
    assert found == parameters(architecture, lambda _, module: type(module).__name__.endswith(kinds))
    assert len(found) >= 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bitfit_trains_every_bias_or_says_that_there_is_none(architecture: str) -> None:
    biases = {name for name, _ in tiny_model(architecture).base_model.named_parameters() if name.endswith("bias")}
    if architecture in NO_BIASES:
        assert not biases
        with pytest.raises(UserError, match="bitfit: 'biases' names no parameter"):
            selected(architecture, BitFit())
        return
    prefix = tiny_model(architecture).base_model_prefix
    assert selected(architecture, BitFit()) == {f"{prefix}.{name}" for name in biases}


def test_the_reduced_bitfit_trains_the_biases_of_queries_and_of_the_layer_that_widens() -> None:
    found = {name.split("layer.")[1] for name in selected("bert", BitFit(biases=("query", "up")))}
    assert found == {f"{n}.{end}" for n in (0, 1) for end in ("attention.self.query.bias", "intermediate.dense.bias")}
    with pytest.raises(UserError, match="'query' names no parameter") as caught:  # GPT-2 has them in one with the keys
        selected("gpt2", BitFit(biases=("query", "up")))
    assert "qkv" in caught.value.hint


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_last_k_trains_the_top_blocks_alone(architecture: str) -> None:
    model = tiny_model(architecture)
    blocks = [block for stack in stacks(model) for block in stack]
    assert len(stacks(model)) == (2 if architecture in TWO_STACKS else 1)
    assert all(len(stack) == 2 for stack in stacks(model))
    for k in (1, len(blocks)):
        names = {name for name, _ in model.named_parameters()}
        wanted = {name for name in names if name.startswith(tuple(f"{block}." for block in blocks[-k:]))}
        assert selected(architecture, LastK(k=k)) == wanted
    with pytest.raises(UserError, match=rf"k is 9, and this base has {len(blocks)} blocks"):
        selected(architecture, LastK(k=9))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_embeddings_can_be_frozen_by_one_word(architecture: str) -> None:
    whole, rest = selected(architecture, Full()), selected(architecture, Full(exclude="embeddings"))
    embeddings = whole - rest
    model = tiny_model(architecture)
    assert any(model.get_parameter(name) is model.get_input_embeddings().weight for name in embeddings)
    assert all("emb" in name or name.endswith(("wte.weight", "wpe.weight", "shared.weight")) for name in embeddings)
    assert not [name for name in rest if "position_embeddings" in name or "wpe" in name]
    assert {name for name in whole if "relative_attention_bias" in name} <= rest, "a table of biases is no embedding"


def test_a_name_stands_for_whole_parts_and_any_regular_expression_will_do() -> None:
    first = selected("bert", Select(parameters="layer.1"))
    assert first == parameters("bert", lambda path, _: path.startswith("encoder.layer.1."))
    assert selected("bert", Select(parameters="encoder[.]layer[.][1]")) == first
    assert selected("bert", Select(parameters="layer.1", exclude=("norms", "biases"))) == {
        name for name in first if name.endswith("weight") and "LayerNorm" not in name
    }


@pytest.mark.parametrize(
    ("method", "why", "hint"),
    [
        (Select(parameters="layer.2"), "'layer.2' names no parameter", "layer"),
        (Select(parameters=("norms", "qurey")), "'qurey' names no parameter", "query"),
        (Select(parameters="ebmeddings"), "'ebmeddings' names no parameter", "embeddings"),
        (Select(parameters="(query"), "no valid regular expression", "layer.1"),
        (Select(parameters="norms", exclude="query"), "'query' names no parameter", "norms"),
        (Select(parameters="norms", exclude="norms"), "excluded again", "exclude less"),
        (Select(), "parameters is empty", "parameters=norms"),
        (Full(exclude="embedings"), "'embedings' names no parameter", "embeddings"),
        (BitFit(biases="gate"), "'gate' names no parameter", "query"),
    ],
    ids=str,
)
def test_what_selects_nothing_is_refused_with_near_names(method: Selection, why: str, hint: str) -> None:
    model = tiny_model("bert")
    with pytest.raises(UserError) as caught:
        deltatune.attach(model, method)
    assert why in caught.value.message
    assert hint in caught.value.hint
    assert all(parameter.requires_grad for parameter in model.parameters()), "the model is as it was"
    with pytest.raises(UserError, match="k must be at least 1, not 0"):
        LastK(k=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("bases") / "bert", "bert")


@pytest.mark.parametrize("method", SELECTIONS.values(), ids=SELECTIONS.keys())
def test_counted_parameters_are_the_actual_and_the_saved_ones(method: Selection, folder: Path, tmp_path: Path) -> None:
    counted = count(find_base(str(folder)), method, ("0", "1"))
    model = deltatune.attach(deltatune.load(str(folder), labels=("0", "1")).model, method)
    assert counted.trainable == sum(p.numel() for p in trainable_parameters(model).values())
    assert counted.total == sum(p.numel() for p in model.parameters())
    deltatune.save_adapter(model, tmp_path)
    assert counted.stored == sum(tensor.numel() for tensor in load_file(tmp_path / TENSORS).values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", [Norms(), BitFit(), Select(parameters="norms", exclude="biases")], ids=str)
def test_a_norm_trains_over_a_base_in_16_bits(architecture: str, method: Selection) -> None:
    if isinstance(method, BitFit) and architecture in NO_BIASES:
        return
    if isinstance(method, Select) and architecture in ("llama", "qwen2", "t5"):
        method = Norms()  # no norm has a bias to leave out
    model = deltatune.attach(tiny_model(architecture), method).train()
    prepare(model, "bf16")
    model.config.pad_token_id = 0
    with autocast("bf16", torch.device("cpu")):
        model(**tiny_inputs(), labels=LABELS).loss.backward()
    for name, parameter in trainable_parameters(model).items():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None, name


def decoder() -> PreTrainedModel:
    """A tiny GPT-2 whose output layer is its embedding."""
    return tiny_language_model("gpt2")


@pytest.mark.parametrize("name", ["wte", "lm_head", "embeddings"])
def test_a_tied_weight_is_trained_saved_and_loaded_once_by_any_of_its_names(name: str, tmp_path: Path) -> None:
    model = shaken(deltatune.attach(decoder(), Select(parameters=name, exclude=() if name != "embeddings" else "wpe")))
    assert set(trainable_parameters(model)) == {"transformer.wte.weight"}
    deltatune.save_adapter(model, tmp_path)
    assert set(load_file(tmp_path / TENSORS)) == {"base_model.model.transformer.wte.weight"}
    loaded = deltatune.load_adapter(decoder(), tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert not torch.equal(loaded.lm_head.weight, decoder().lm_head.weight)
    assert all(torch.equal(value, bits(model)[key]) for key, value in loaded.state_dict().items())


UPPER = {"last-k": LastK(k=1), "lora on upper layers": LoRA(rank=2, targets=r".*\.1\..*(query|q_lin|c_attn|q_proj|q)")}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", UPPER.values(), ids=UPPER.keys())
@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "checkpointing"])
def test_the_backward_pass_ends_below_the_lowest_trained_block(
    architecture: str, method: Method, recompute: bool
) -> None:
    model = deltatune.attach(tiny_model(architecture), method).train()
    model.config.use_cache, model.config.pad_token_id = False, 0
    blocks = [block for stack in stacks(model) for block in stack]
    lowest = next(n for n, path in enumerate(blocks) if any(p.requires_grad for p in parameters_below(model, path)))
    assert lowest >= 1
    for path in blocks[:lowest]:  # as the loop has them; T5 asks for a gradient of some zeros where it checkpoints
        model.get_submodule(path).eval()
    runs, graphs = dict.fromkeys(blocks, 0), {}

    def count_runs(path: str) -> None:
        runs[path] += 1

    def look_for_a_graph(path: str, output: object) -> None:
        graphs[path] = (output[0] if isinstance(output, tuple) else output).requires_grad

    for path in blocks:
        block = model.get_submodule(path)
        first = next(path for path in linear_roles(block))
        block.get_submodule(first).register_forward_hook(lambda *_, path=path: count_runs(path))
        block.register_forward_hook(lambda *seen, path=path: look_for_a_graph(path, seen[-1]))
    with checkpointing(model, recompute):
        model(**tiny_inputs(), labels=LABELS).loss.backward()
    assert [graphs[path] for path in blocks] == [n >= lowest for n in range(len(blocks))]
    assert [runs[path] for path in blocks] == [1 + (recompute and n >= lowest) for n in range(len(blocks))]


def parameters_below(model: PreTrainedModel, path: str) -> list[nn.Parameter]:
    return list(model.get_submodule(path).parameters())
