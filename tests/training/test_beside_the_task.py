"""What a run measures beside the task: calibration, how far states moved, how long a forward pass takes."""

from pathlib import Path

import pytest
import torch

import deltatune
from deltatune.comparing.latency import measure_latency
from deltatune.data import Split
from deltatune.models.attach import attach, trainable_parameters
from deltatune.training.classification import calibration_error
from deltatune.training.plain_text import drift, plain_text_states
from tiny import save_tiny

TEXTS = Split(["the film is good", "a dull story", "it was very very boring and weak"], [1, 0, 0])


def test_answers_as_often_right_as_their_probability_says_have_no_calibration_error():
    confidence = torch.tensor([0.75] * 4 + [0.5] * 2)
    right = torch.tensor([True, True, True, False, True, False])
    assert calibration_error(confidence, right) == pytest.approx(0, abs=1e-7)


def test_the_calibration_error_is_the_mean_gap_over_bins_weighed_by_their_examples():
    confidence = torch.tensor([0.99, 0.97, 0.95, 0.55])  # three in the last bin, mean 0.97; one in the ninth
    right = torch.tensor([True, True, False, True])
    assert calibration_error(confidence, right) == pytest.approx(3 / 4 * abs(2 / 3 - 0.97) + 1 / 4 * abs(1 - 0.55))
    assert calibration_error(torch.ones(5), torch.zeros(5, dtype=torch.bool)) == 1


def test_a_bin_has_its_upper_bound_in_it():
    apart, together = (torch.tensor([low, 0.51]) for low in (0.5, 0.502))
    right = torch.tensor([True, False])
    assert calibration_error(apart, right, bins=4) == pytest.approx((0.5 + 0.51) / 2)
    assert calibration_error(together, right, bins=4) == pytest.approx(abs(1 / 2 - 0.506), abs=1e-6)


@pytest.fixture
def base(tmp_path: Path) -> deltatune.Base:
    save_tiny(tmp_path, "bert")
    return deltatune.load(str(tmp_path), labels=("no", "yes"))


def shake(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)


@pytest.mark.parametrize("method", ["lora", "prompt", "full", "head"])
def test_states_drift_where_the_base_is_changed_and_nowhere_else(base: deltatune.Base, method: str):
    attach(base.model, deltatune.make(method))
    before = plain_text_states(base, "fp32")
    same = plain_text_states(base, "fp32")
    shake(base.model)
    after = plain_text_states(base, "fp32")
    assert before is not None
    assert same is not None
    assert after is not None
    assert before.shape == after.shape
    assert before.shape[1] == 32
    assert drift(before, same) == pytest.approx(0, abs=1e-6)
    moved = drift(before, after)
    assert moved == pytest.approx(0, abs=1e-6) if method == "head" else 0.01 < moved <= 2


@pytest.mark.parametrize("method", ["lora", "prompt", "full", "head", "lora+norms"])
def test_a_forward_pass_is_timed_and_the_model_is_left_as_it_was(base: deltatune.Base, method: str):
    attach(base.model, deltatune.make(method))
    shake(base.model)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    found = measure_latency(base, TEXTS, 64, "fp32")
    assert found.rounds >= 3
    assert found.tokens == 6  # of 5, 6 and 9
    assert min(found.base, found.adapted) > 0
    assert (found.merged is None) == (method == "prompt")
    if method == "full":
        assert found.base == found.adapted == found.merged
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
