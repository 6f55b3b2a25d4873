"""HiRA: what PEFT made gives its logits, and a thin product makes an update of full rank."""

from pathlib import Path

import peft
import pytest
import torch

import deltatune
from conformance.cases import shaken
from deltatune import HiRA
from deltatune.errors import UserError
from deltatune.methods import Site
from deltatune.methods.hira import HiRADelta
from peer import peft_adapter
from tiny import tiny_inputs, tiny_model


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("bert", {"r": 3, "target_modules": ["query", "value"]}),
        ("bert", {"r": 2, "target_modules": ["query", "key"], "rank_pattern": {"key": 5}, "hira_dropout": 0.2}),
        ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("distilbert", {"r": 8, "target_modules": ["q_lin", "out_lin", "lin1"]}),
        ("llama", {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_weights": "gaussian"}),
        ("t5", {"r": 2, "target_modules": ["q", "wo"]}),
    ],
)
def test_an_adapter_that_peft_made_gives_its_logits_here(architecture: str, options: dict, tmp_path: Path) -> None:
    theirs = peft_adapter(tmp_path, architecture, peft.HiraConfig(task_type="SEQ_CLS", **options))
    model = deltatune.load_adapter(tiny_model(architecture), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(**tiny_inputs()).logits, theirs, atol=1e-5, rtol=1e-5)


def test_a_product_of_rank_one_makes_an_update_of_full_rank() -> None:
    delta = shaken(HiRADelta(Site(20, 12), HiRA(rank=1), torch.Generator().manual_seed(0))).double()
    weight = torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.linalg.matrix_rank(delta.merged(weight) - weight) == 12


def test_what_is_zero_stays_zero_and_what_is_twice_as_large_changes_twice_as_much() -> None:
    delta = shaken(HiRADelta(Site(20, 12), HiRA(rank=4), torch.Generator().manual_seed(0)))
    weight = torch.ones(20, 12)
    weight[3] = 0
    weight[5] = 2
    torch.testing.assert_close(delta.merged(weight), weight * delta.merged(torch.ones(20, 12)))
    assert not delta.merged(weight)[3].any()


def test_the_defaults_and_the_count_are_those_of_the_paper() -> None:
    assert HiRA().rank == 32
    assert HiRA().parameters(Site(768, 3072)) == 32 * (768 + 3072)


def test_bad_hyperparameters_are_refused() -> None:
    with pytest.raises(UserError, match="rank must be at least 1"):
        HiRA(rank=0)
    with pytest.raises(UserError, match="dropout must be at least 0 and below 1"):
        HiRA(dropout=1.0)
    with pytest.raises(UserError, match="rank 32 is more than a 20×12 weight has") as caught:
        HiRA().check(Site(20, 12))
    assert caught.value.hint == "the largest is 12"
