"""LoHa: what PEFT made gives its logits, and both fast forms are the definition."""

from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import deltatune
from conformance.cases import shaken
from deltatune import LoHa
from deltatune.errors import UserError
from deltatune.methods import Site
from deltatune.methods.loha import LoHaDelta
from deltatune.weights import weight_of
from peer import peft_adapter
from tiny import tiny_inputs, tiny_model


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("bert", {"r": 3, "alpha": 7, "target_modules": ["query", "value"]}),
        (
            "bert",
            {"r": 2, "target_modules": ["query", "key"], "rank_pattern": {"key": 5}, "alpha_pattern": {"query": 3}},
        ),
        ("distilbert", {"r": 8, "target_modules": ["q_lin", "out_lin", "lin1"]}),
        ("llama", {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
        ("t5", {"r": 2, "alpha": 1, "target_modules": ["q", "wo"]}),
    ],
)
def test_an_adapter_that_peft_made_gives_its_logits_here(architecture: str, options: dict, tmp_path: Path) -> None:
    theirs = peft_adapter(tmp_path, architecture, peft.LoHaConfig(task_type="SEQ_CLS", **options))
    model = deltatune.load_adapter(tiny_model(architecture), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(**tiny_inputs()).logits, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"rank_dropout": 0.1}, {"module_dropout": 0.1}])
def test_pefts_own_dropouts_are_refused_by_name(options: dict, tmp_path: Path) -> None:
    peft_adapter(tmp_path, "bert", peft.LoHaConfig(task_type="SEQ_CLS", target_modules=["query"], **options))
    with pytest.raises(UserError, match=next(iter(options))):
        deltatune.load_adapter(tiny_model("bert"), tmp_path)


def delta(method: LoHa, site: Site) -> LoHaDelta:
    return shaken(LoHaDelta(site, method, torch.Generator().manual_seed(0))).double()


@pytest.mark.parametrize("rank", [3, 8])
def test_the_fast_forms_are_the_definition_in_value_and_gradient(rank: int) -> None:
    site, layer = Site(40, 60), nn.Linear(60, 40).double().requires_grad_(False)
    assert LoHa(rank=3).by_factors(site)
    assert not LoHa(rank=8).by_factors(site)
    module = delta(LoHa(rank=rank, alpha=5.0), site)
    x = torch.randn(7, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    w1_a, w1_b, w2_a, w2_b = module.parameters()
    plain = x @ (layer.weight + 5 / rank * (w1_a @ w1_b) * (w2_a @ w2_b)).T + layer.bias
    fast = module(x, weight_of(layer), layer.bias)
    torch.testing.assert_close(fast, plain)
    outward = torch.randn(7, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for ours, theirs in zip(
        torch.autograd.grad(fast, module.parameters(), outward),
        torch.autograd.grad(plain, module.parameters(), outward),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_update_has_the_rank_squared() -> None:
    module = delta(LoHa(rank=3), Site(40, 60))
    assert torch.linalg.matrix_rank(module.merged(torch.zeros(40, 60, dtype=torch.float64))) == 9


def test_it_has_the_parameters_of_two_loras_of_that_rank() -> None:
    site = Site(768, 3072)
    assert LoHa(rank=8).parameters(site) == 2 * deltatune.LoRA(rank=8).parameters(site) == 2 * 8 * (768 + 3072)


def test_left_out_alpha_leaves_the_product_as_it_is() -> None:
    assert LoHa(rank=8).scale == LoHa(rank=3).scale == 1


def test_bad_hyperparameters_are_refused() -> None:
    with pytest.raises(UserError, match="rank must be at least 1"):
        LoHa(rank=0)
    with pytest.raises(UserError, match="alpha must be a positive number"):
        LoHa(alpha_pattern={"mlp": -1.0})
    with pytest.raises(UserError, match="rank 13 is more than") as caught:
        LoHa(rank=13).check(Site(20, 12))
    assert caught.value.hint == "the largest is 12"
