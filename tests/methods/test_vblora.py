"""VB-LoRA: the paper's counts, the compact file and what it keeps, PEFT's adapters, and what is refused."""

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import deltatune
from conformance.cases import shaken
from deltatune import VBLoRA
from deltatune.errors import UserError
from deltatune.methods import Site
from deltatune.models.adapters import TENSORS
from deltatune.models.attach import adapted_layers, learning_rates
from deltatune.weights import weight_of
from peer import peft_adapter
from tiny import tiny_inputs, tiny_model

ROBERTA_BASE_QV = [Site(768, 768, f"layer.{index}.{role}", role) for index in range(12) for role in ("query", "value")]
TINY = VBLoRA(rank=2, num_vectors=20, vector_length=4)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_inputs()).logits


@pytest.mark.parametrize(
    ("architecture", "targets", "options"),
    [
        ("bert", ["query", "value"], {"num_vectors": 30, "vector_length": 8, "topk": 3}),
        ("roberta", ["query", "output.dense"], {"save_only_topk_weights": True, "num_vectors": 300}),
        ("distilbert", ["q_lin"], {"save_only_topk_weights": True, "topk": 1, "vblora_dropout": 0.1}),
        ("gpt2", ["c_attn", "c_proj"], {"fan_in_fan_out": True, "r": 3}),
        ("llama", ["k_proj", "down_proj"], {"save_only_topk_weights": True, "topk": 4, "num_vectors": 9}),
        ("t5", ["q", "wo"], {}),
    ],
)
def test_an_adapter_that_peft_made_gives_its_logits_here(
    architecture: str, targets: list[str], options: dict, tmp_path: Path
) -> None:
    config = peft.VBLoRAConfig(
        task_type="SEQ_CLS", target_modules=targets, **{"num_vectors": 20, "vector_length": 4, **options}
    )
    theirs = peft_adapter(tmp_path, architecture, config)
    ours = deltatune.load_adapter(tiny_model(architecture), tmp_path)
    torch.testing.assert_close(logits(ours), theirs, atol=1e-5, rtol=1e-5)


def test_the_paper_s_counts_for_query_and_value_of_roberta_base() -> None:
    """23,904 in numbers of 4 bytes, at 90 vectors: an index takes one byte."""
    method = VBLoRA(num_vectors=90, save_only_topk=True)
    pieces = sum(method.parameters(site) for site in ROBERTA_BASE_QV) // 90
    assert pieces == 576
    assert method.stored_parameters(ROBERTA_BASE_QV) == 90 * 256 + pieces * (1 + 2)
    assert method.stored_parameters(ROBERTA_BASE_QV) - pieces * 2 * 3 // 4 == 23_904
    assert VBLoRA(num_vectors=90).stored_parameters(ROBERTA_BASE_QV) == 90 * (256 + pieces)


@pytest.mark.parametrize("method", [TINY, VBLoRA(rank=3, num_vectors=300, vector_length=8, topk=4)])
@pytest.mark.parametrize("compact", [False, True])
def test_a_file_holds_as_many_numbers_as_stated(method: VBLoRA, compact: bool, tmp_path: Path) -> None:
    method = VBLoRA(method.rank, method.num_vectors, method.vector_length, method.topk, save_only_topk=compact)
    model = deltatune.attach(tiny_model("bert"), method)
    deltatune.save_adapter(model, tmp_path / "adapter")
    tensors = [t for name, t in load_file(tmp_path / "adapter" / TENSORS).items() if "vblora" in name]
    stated = method.stored_parameters([layer.site for layer in adapted_layers(model).values()])
    assert sum(tensor.numel() for tensor in tensors) == stated


def test_a_compact_file_holds_little_more_than_the_bank(tmp_path: Path) -> None:
    sizes = {}
    for compact in (False, True):
        method = VBLoRA(num_vectors=90, vector_length=16, save_only_topk=compact, targets="attention-qv")
        model = deltatune.attach(tiny_model("bert"), method)
        deltatune.save_adapter(model, tmp_path / "adapter")
        tensors = {n: t for n, t in load_file(tmp_path / "adapter" / TENSORS).items() if "vblora" in n}
        sizes[compact] = sum(tensor.nbytes for tensor in tensors.values())
    pieces = 4 * 4 * (2 + 2)  # four weights of 32×32 at rank 4
    assert sizes[False] == 4 * 90 * (16 + pieces)
    assert sizes[True] == 4 * (90 * 16 + pieces) + 2 * pieces  # a weight of four bytes, two indices of one


@pytest.mark.parametrize(("num_vectors", "dtype"), [(255, torch.uint8), (256, torch.int16), (40_000, torch.int32)])
def test_indices_are_as_small_as_peft_s(num_vectors: int, dtype: torch.dtype) -> None:
    method = VBLoRA(num_vectors=num_vectors, vector_length=1, rank=1, save_only_topk=True)
    layer, site, generator = nn.Linear(2, 2), Site(2, 2), torch.Generator()
    delta = method.delta(site, weight_of(layer), method.share([site], generator), generator)
    assert method.stored(site, delta)["vblora_logits_A_topk_indices"].dtype == dtype


def test_saturated_weights_leave_the_last_no_less_than_nothing() -> None:
    """PEFT takes its logarithm: a sum of weights that rounding puts above 1 would make its logits not a number."""
    method = VBLoRA(num_vectors=8, vector_length=1, rank=4, topk=8, save_only_topk=True)
    site, generator = Site(4000, 4000), torch.Generator().manual_seed(0)
    delta = method.delta(site, weight_of(nn.Linear(1, 1)), method.share([site], generator), generator)
    with torch.no_grad():
        delta.logits_A.mul_(100 * torch.rand(4, 4000, 1, generator=generator))
    weights = method.stored(site, delta)["vblora_logits_A_topk_weights"]
    assert (delta.logits_A.topk(8)[0].softmax(-1)[..., :-1].sum(-1) > 1).any()
    assert (weights.sum(-1) <= 1).all()


def test_from_a_compact_file_the_bank_and_the_weights_train_on_and_the_choice_stays(tmp_path: Path) -> None:
    method = VBLoRA(rank=2, num_vectors=20, vector_length=4, topk=3, save_only_topk=True)
    deltatune.save_adapter(shaken(deltatune.attach(tiny_model("bert"), method)), tmp_path / "adapter")
    model = deltatune.load_adapter(tiny_model("bert"), tmp_path / "adapter")
    layer = next(iter(adapted_layers(model).values()))
    bank, before = layer.delta.bank.vectors, layer.delta.logits_A.detach().clone()
    first = bank.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(**tiny_inputs(), labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
    after = layer.delta.logits_A.detach()
    assert not torch.equal(bank, first)
    assert not torch.equal(after.topk(3).values.softmax(-1), before.topk(3).values.softmax(-1))
    assert torch.equal(after.topk(3).indices.sort().values, before.topk(3).indices.sort().values)
    deltatune.save_adapter(model, tmp_path / "further")
    torch.testing.assert_close(
        logits(deltatune.load_adapter(tiny_model("bert"), tmp_path / "further")), logits(model.eval())
    )


def test_an_index_beyond_the_bank_is_refused(tmp_path: Path) -> None:
    options = {"num_vectors": 20, "vector_length": 4, "save_only_topk_weights": True, "target_modules": ["query"]}
    peft.get_peft_model(tiny_model("bert"), peft.VBLoRAConfig(**options)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    next(tensor for name, tensor in tensors.items() if name.endswith("_indices")).fill_(20)
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(UserError, match="beyond its bank of 20"):
        deltatune.load_adapter(tiny_model("bert"), tmp_path)


def test_all_layers_mix_one_bank_which_learns_at_a_tenth_of_the_rate() -> None:
    model = deltatune.attach(tiny_model("bert"), TINY)
    assert len({id(layer.delta.bank.vectors) for layer in adapted_layers(model).values()}) == 1
    rates = {name: rate for name, rate in learning_rates(model).items() if ".delta" in name}
    assert [name.rpartition(".")[2] for name, rate in rates.items() if rate != 1.0] == ["vectors"]
    assert next(rate for name, rate in rates.items() if name.endswith("vectors")) == 0.1


@pytest.mark.parametrize(("site", "near"), [(Site(384, 384), "192, 128, 384"), (Site(1536, 384), "192, 128, 384")])
def test_a_length_that_does_not_divide_both_sides_is_refused_with_the_nearest_that_do(site: Site, near: str) -> None:
    with pytest.raises(UserError, match=rf"vector_length 256 .*{site.out}×{site.in_}") as caught:
        VBLoRA().check(site)
    assert near in caught.value.hint
    for length in map(int, near.split(", ")):
        VBLoRA(vector_length=length).check(site)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"topk": 3, "num_vectors": 2}, "topk 3 is more than the 2 vectors"),
        ({"topk": 0}, "topk must be at least 1"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"vector_length": 0}, "vector_length must be at least 1"),
        ({"dropout": 1.0}, "dropout must be"),
    ],
)
def test_impossible_hyperparameters_are_refused(options: dict, why: str) -> None:
    with pytest.raises(UserError, match=why):
        VBLoRA(**options)


def test_trained_biases_of_peft_are_refused(tmp_path: Path) -> None:
    options = {"num_vectors": 20, "vector_length": 4, "bias": "vblora_only", "target_modules": ["query"]}
    peft.get_peft_model(tiny_model("bert"), peft.VBLoRAConfig(**options)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="bias='vblora_only'"):
        deltatune.load_adapter(tiny_model("bert"), tmp_path)
