"""MiSS against the paper's picture and PEFT's adapters."""

from pathlib import Path

import peft
import pytest
import torch

import deltatune
from conformance.cases import adapted, shaken
from deltatune import MiSS
from deltatune.errors import UserError
from deltatune.methods import Site
from peer import peft_adapter
from tiny import tiny_inputs, tiny_model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_inputs()).logits


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("bert", {"r": 8, "target_modules": ["query", "value"], "miss_dropout": 0.2}),
        ("bert", {"r": 6, "target_modules": "all-linear"}),  # divides neither 32 nor 64
        ("roberta", {"r": 4, "init_weights": False, "target_modules": ["key"]}),
        ("distilbert", {"r": 32, "target_modules": ["lin1", "lin2"]}),
        ("llama", {"r": 5, "target_modules": ["k_proj", "down_proj"]}),
        ("t5", {"r": 7, "target_modules": ["q", "wo"]}),
    ],
)
def test_an_adapter_that_peft_made_gives_its_logits_here(architecture: str, options: dict, tmp_path: Path) -> None:
    theirs = peft_adapter(tmp_path, architecture, peft.MissConfig(task_type="SEQ_CLS", **options))
    ours = deltatune.load_adapter(tiny_model(architecture), tmp_path)
    torch.testing.assert_close(logits(ours), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"init_weights": "bat"}, "variant 'bat'"),
        ({"init_weights": "mini", "mini_r": 8}, "variant 'mini'"),
        ({"bias": "all"}, "bias='all'"),
    ],
)
def test_the_other_variants_of_peft_are_refused_by_name(options: dict, why: str, tmp_path: Path) -> None:
    peft_adapter(tmp_path, "bert", peft.MissConfig(task_type="SEQ_CLS", r=8, target_modules=["query"], **options))
    with pytest.raises(UserError, match=why):
        deltatune.load_adapter(tiny_model("bert"), tmp_path)


@pytest.mark.parametrize("rank", [1, 4, 5, 12])
def test_inputs_a_multiple_of_the_rank_apart_share_a_column(rank: int) -> None:
    layer = shaken(adapted(MiSS(rank=rank), "linear"))
    update = layer.delta.merged(torch.zeros(20, 12))
    for j in range(12):
        assert torch.equal(update[:, j], layer.delta.D[j % rank])


def test_a_site_trains_rank_times_out() -> None:
    assert MiSS().rank == 64
    assert MiSS().parameters(Site(768, 3072)) == 64 * 768


@pytest.mark.parametrize(
    ("options", "why"), [({"rank": 0}, "rank must be at least 1"), ({"dropout": 1.0}, "dropout must be")]
)
def test_hyperparameters_out_of_range_are_refused(options: dict, why: str) -> None:
    with pytest.raises(UserError, match=why):
        MiSS(**options)


def test_a_rank_above_the_number_of_inputs_is_refused_with_the_largest() -> None:
    with pytest.raises(UserError, match="rank 64 is more than the 32 inputs of a 32×32 weight") as caught:
        deltatune.attach(tiny_model("bert"), MiSS())
    assert caught.value.hint == "the largest is 32"
