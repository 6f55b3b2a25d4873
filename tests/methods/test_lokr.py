"""LoKr: what PEFT made gives its logits, sizes are factored as there, and the fast form is the Kronecker product."""

from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.lokr.layer import factorization as pefts_factorization
from torch import nn

import deltatune
from conformance.cases import shaken
from deltatune import LoKr
from deltatune.errors import UserError
from deltatune.methods import Site
from deltatune.methods.lokr import LoKrDelta, factorization
from deltatune.weights import weight_of
from peer import peft_adapter
from tiny import tiny_inputs, tiny_model


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("bert", {"r": 8, "alpha": 3, "target_modules": ["query", "value"]}),
        ("bert", {"r": 1, "decompose_both": True, "target_modules": "all-linear"}),
        ("roberta", {"r": 2, "decompose_factor": 2, "target_modules": ["query"], "init_weights": "lycoris"}),
        ("distilbert", {"r": 2, "decompose_factor": 5, "target_modules": ["q_lin", "lin2"]}),
        ("llama", {"r": 2, "target_modules": ["q_proj", "k_proj"], "rank_pattern": {"k_proj": 1}}),
        ("t5", {"r": 1, "alpha_pattern": {"wo": 3}, "decompose_factor": 16, "target_modules": ["q", "wo"]}),
    ],
)
def test_an_adapter_that_peft_made_gives_its_logits_here(architecture: str, options: dict, tmp_path: Path) -> None:
    theirs = peft_adapter(tmp_path, architecture, peft.LoKrConfig(task_type="SEQ_CLS", **options))
    model = deltatune.load_adapter(tiny_model(architecture), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(**tiny_inputs()).logits, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"rank_dropout": 0.1}, {"module_dropout": 0.1}])
def test_pefts_own_dropouts_are_refused_by_name(options: dict, tmp_path: Path) -> None:
    peft_adapter(tmp_path, "bert", peft.LoKrConfig(task_type="SEQ_CLS", target_modules=["query"], **options))
    with pytest.raises(UserError, match=next(iter(options))):
        deltatune.load_adapter(tiny_model("bert"), tmp_path)


def test_sizes_are_factored_as_in_peft() -> None:
    for dimension in (*range(1, 130), 384, 768, 1536, 3072, 4096, 11008):
        for factor in (-1, *range(1, 20), 64, 5000):
            assert factorization(dimension, factor) == pefts_factorization(dimension, factor)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"rank": 8}, {"w1", "w2"}),
        ({"rank": 2, "decompose_factor": 2}, {"w1", "w2_a", "w2_b"}),
        ({"rank": 1, "decompose_both": True}, {"w1_a", "w1_b", "w2_a", "w2_b"}),
        ({"rank": 2, "decompose_factor": 12, "decompose_both": True}, {"w1_a", "w1_b", "w2"}),
    ],
)
def test_the_fast_form_is_the_definition_in_value_and_gradient(options: dict, names: set[str]) -> None:
    site, layer = Site(24, 36), nn.Linear(36, 24).double().requires_grad_(False)
    method = LoKr(alpha=5.0, **options)
    module = shaken(LoKrDelta(site, method, torch.Generator().manual_seed(0))).double()
    parts = dict(module.named_parameters())
    assert parts.keys() == names
    w1 = parts["w1"] if "w1" in parts else parts["w1_a"] @ parts["w1_b"]
    w2 = parts["w2"] if "w2" in parts else parts["w2_a"] @ parts["w2_b"]
    x = torch.randn(7, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    plain = x @ (layer.weight + 5 / method.rank * torch.kron(w1, w2)).T + layer.bias
    fast = module(x, weight_of(layer), layer.bias)
    torch.testing.assert_close(fast, plain)
    outward = torch.randn(7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for ours, theirs in zip(
        torch.autograd.grad(fast, [x, *module.parameters()], outward),
        torch.autograd.grad(plain, [x, *module.parameters()], outward),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_counts_are_those_of_the_factors() -> None:
    site = Site(768, 3072)  # 24·32 and 48·64
    assert LoKr(rank=32).parameters(site) == 24 * 48 + 32 * 64
    assert LoKr(rank=8).parameters(site) == 24 * 48 + 8 * (32 + 64)
    assert LoKr(rank=8, decompose_both=True).parameters(site) == 8 * (24 + 48) + 8 * (32 + 64)
    assert LoKr(rank=8, decompose_factor=4).parameters(site) == 4 * 4 + 8 * (192 + 768)


def test_left_out_alpha_leaves_the_product_as_it_is() -> None:
    assert LoKr(rank=8).scale == LoKr(rank=100_000).scale == 1


@pytest.mark.parametrize("factor", [0, -2])
def test_a_factor_that_means_nothing_is_refused(factor: int) -> None:
    with pytest.raises(UserError, match=f"decompose_factor must be -1 or at least 1, not {factor}") as caught:
        LoKr(decompose_factor=factor)
    assert "-1 makes" in caught.value.hint


def test_bad_ranks_and_alphas_are_refused() -> None:
    with pytest.raises(UserError, match="rank must be at least 1"):
        LoKr(rank_pattern={"mlp": 0})
    with pytest.raises(UserError, match="alpha must be a positive number"):
        LoKr(alpha=0)
