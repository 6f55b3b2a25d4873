"""FourierFT: its cosines are the inverse Fourier transform, and its files are both ways."""

from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import deltatune
from deltatune import FourierFT
from deltatune.errors import UserError
from deltatune.methods import Site
from deltatune.methods.fourierft import FourierFTDelta, _cosines
from deltatune.weights import weight_of
from peer import peft_adapter
from tiny import tiny_inputs, tiny_model


def fresh(method: FourierFT, out: int, in_: int) -> FourierFTDelta:
    return method.delta(Site(out, in_), weight_of(nn.Linear(in_, out)), None, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("bert", {"n_frequency": 100, "target_modules": ["query", "value"]}),
        ("bert", {"n_frequency": 50, "scaling": 30.0, "random_loc_seed": 3, "target_modules": "all-linear"}),
        ("bert", {"n_frequency": 50, "n_frequency_pattern": {"key": 9}, "target_modules": ["key", "query"]}),
        ("gpt2", {"n_frequency": 80, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
        ("llama", {"n_frequency": 80, "init_weights": True, "target_modules": ["k_proj", "down_proj"]}),
    ],
)
def test_an_adapter_that_peft_made_gives_its_logits_here(architecture: str, options: dict, tmp_path: Path) -> None:
    config = peft.FourierFTConfig(task_type="SEQ_CLS", **options)
    expected = peft_adapter(tmp_path, architecture, config)
    model = deltatune.load_adapter(tiny_model(architecture), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(**tiny_inputs()).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("out", "in_"), [(20, 12), (13, 9), (12, 13), (1, 5), (6, 1)])
def test_the_cosines_are_the_real_part_of_the_fourier_transform_and_their_own_adjoint(out: int, in_: int) -> None:
    generator = torch.Generator().manual_seed(0)
    S, G = (torch.randn(out, in_, dtype=torch.float64, generator=generator) for _ in range(2))
    torch.testing.assert_close(_cosines(S) / (out * in_), torch.fft.ifft2(S).real)
    torch.testing.assert_close((_cosines(S) * G).sum(), (S * _cosines(G)).sum())


@pytest.mark.parametrize(("out", "in_"), [(64, 48), (33, 90)])
@pytest.mark.parametrize("coefficients", [30, 1000])
def test_the_stated_distance_of_the_start_is_that_of_the_normal_coefficients(
    out: int, in_: int, coefficients: int
) -> None:
    method = FourierFT(coefficients=coefficients)
    delta = fresh(method, out, in_)
    actual = delta.update(delta.spectrum).square().mean().sqrt().item()
    assert actual == pytest.approx(method.start_distance(Site(out, in_)), rel=0.3)
    assert FourierFT(coefficients=coefficients, init="zeros").start_distance(Site(out, in_)) == 0


def test_the_defaults_and_counts_are_the_papers() -> None:
    method = FourierFT()
    assert (method.coefficients, method.scaling, method.location_seed, method.init) == (1000, 150.0, 777, "normal")
    # Table 1 of the paper: query and value of RoBERTa-base are 24 layers, of RoBERTa-large 48.
    assert 24 * method.parameters(Site(768, 768)) == 24_000
    assert 48 * method.parameters(Site(1024, 1024)) == 48_000


def test_bad_hyperparameters_are_refused() -> None:
    with pytest.raises(UserError, match="coefficients must be at least 1, not 0"):
        FourierFT(coefficients=0)
    with pytest.raises(UserError, match="scaling must be a positive number, not nan"):
        FourierFT(scaling=float("nan"))
    with pytest.raises(UserError, match="a 20×12 weight has no place for 1000 coefficients") as caught:
        FourierFT().check(Site(20, 12))
    assert "240" in caught.value.hint
    with pytest.raises(UserError, match="bias='all'"):
        FourierFT.from_peft({"peft_type": "FOURIERFT", "bias": "all"})
