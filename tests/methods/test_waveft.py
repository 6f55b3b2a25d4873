"""WaveFT: its transform is PyWavelets' and PEFT's, its places are PEFT's, and its files are both ways."""

from pathlib import Path

import numpy as np
import peft
import pytest
import pywt
import torch
from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
from peft.tuners.waveft.layer import WaveFTLinear
from peft.tuners.waveft.wavelet import Wavelet as PeftWavelet
from peft.tuners.waveft.wavelet import wavelist as pefts_wavelets
from torch import nn

import deltatune
from conformance.cases import shaken
from deltatune import WaveFT
from deltatune.errors import UserError
from deltatune.methods import Site
from deltatune.methods.waveft import WaveFTDelta, _filters, _wavelets
from deltatune.weights import weight_of
from peer import peft_adapter
from tiny import tiny_inputs, tiny_model

SHAPES = ((20, 12), (13, 9), (12, 13))


def fresh(method: WaveFT, out: int, in_: int) -> WaveFTDelta:
    base = nn.Linear(in_, out)
    return shaken(method.delta(Site(out, in_), weight_of(base), None, torch.Generator()).double())


def update(delta: WaveFTDelta, out: int, in_: int) -> torch.Tensor:
    return delta.merged(torch.zeros(out, in_, dtype=torch.float64)).detach()


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("bert", {"n_frequency": 100, "target_modules": ["query", "value"]}),
        ("bert", {"n_frequency": 50, "scaling": 7.0, "random_loc_seed": 3, "target_modules": "all-linear"}),
        ("bert", {"n_frequency": 50, "wavelet_family": "sym4", "target_modules": ["key"], "init_weights": False}),
        ("bert", {"n_frequency": 50, "n_frequency_pattern": {"key": 9}, "target_modules": ["key", "query"]}),
        ("gpt2", {"n_frequency": 80, "wavelet_family": "coif2", "target_modules": ["c_attn"], "fan_in_fan_out": True}),
        ("llama", {"n_frequency": 80, "use_idwt": False, "target_modules": ["k_proj", "down_proj"]}),
    ],
)
def test_an_adapter_that_peft_made_gives_its_logits_here(architecture: str, options: dict, tmp_path: Path) -> None:
    config = peft.WaveFTConfig(task_type="SEQ_CLS", **options)
    expected = peft_adapter(tmp_path, architecture, config)
    model = deltatune.load_adapter(tiny_model(architecture), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(**tiny_inputs()).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wavelet", ["db1", "db2", "db10", "db38", "sym2", "sym20", "coif1", "coif17"])
@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_the_update_is_pywavelets_inverse_transform_of_the_centred_spectrum(out: int, in_: int, wavelet: str) -> None:
    method = WaveFT(coefficients=60, scaling=3.0, wavelet=wavelet)
    delta = fresh(method, out, in_)
    places = torch.randperm(out * in_, generator=torch.Generator().manual_seed(777))[:60]
    S = np.zeros((out, in_))
    S.reshape(-1)[places] = delta.spectrum.detach()
    reach = pywt.Wavelet(wavelet).rec_len - 2
    extra = [reach + (side + reach) % 2 for side in (out, in_)]
    padded = np.pad(S, [(e // 2, e - e // 2) for e in extra])
    (cA, cH), (cV, cD) = (np.split(half, 2, axis=1) for half in np.split(padded, 2))
    expected = 3.0 * pywt.idwt2((cA, (cH, cV, cD)), wavelet)[:out, :in_]
    torch.testing.assert_close(update(delta, out, in_), torch.from_numpy(expected), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("wavelet", ["db1", "db4", "sym7", "coif3"])
@pytest.mark.parametrize(("out", "in_"), SHAPES)
def test_the_update_is_pefts(out: int, in_: int, wavelet: str) -> None:
    delta = fresh(WaveFT(coefficients=60, wavelet=wavelet), out, in_)
    config = peft.WaveFTConfig(n_frequency=60, wavelet_family=wavelet)
    theirs = WaveFTLinear(nn.Linear(in_, out).double(), "default", config, n_frequency=60)
    with torch.no_grad():
        theirs.waveft_spectrum["default"].data = delta.spectrum.detach()
        torch.testing.assert_close(update(delta, out, in_), theirs.get_delta_weight("default"), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize(("out", "in_"), SHAPES)
@pytest.mark.parametrize("coefficients", [1, 40, 108])
def test_haars_blocks_hold_the_whole_update(out: int, in_: int, coefficients: int) -> None:
    delta = fresh(WaveFT(coefficients=coefficients), out, in_)
    blocks = torch.zeros(out * in_, dtype=torch.float64)
    blocks[delta.places] = delta.values(delta.spectrum).detach()
    torch.testing.assert_close(blocks.view(out, in_), update(delta, out, in_), atol=1e-12, rtol=1e-12)
    assert len(delta.places.unique()) == len(delta.places) <= 4 * coefficients


def test_a_full_spectrum_makes_any_update() -> None:
    delta = fresh(WaveFT(coefficients=240, scaling=1.0, location_seed=0), 20, 12)
    squares = delta.spectrum.detach().square().sum(), update(delta, 20, 12).square().sum()
    torch.testing.assert_close(*squares)  # the transform is orthogonal


def test_every_wavelet_of_peft_is_here_and_no_other() -> None:
    assert set(_wavelets()) == set(WAVELET_REDUCTIONS)
    assert all((len(_filters(name)[0]) - 2,) * 2 == WAVELET_REDUCTIONS[name] for name in _wavelets())


def test_the_defaults_are_the_papers() -> None:
    method = WaveFT()
    assert (method.coefficients, method.scaling, method.wavelet, method.location_seed) == (2592, 25.0, "db1", 777)
    assert method.parameters(Site(768, 768)) == method.parameters(Site(3072, 768)) == 2592


def test_in_16_bits_the_changed_weight_is_nearer_to_the_exact_output_than_two_products() -> None:
    base = nn.Linear(128, 128, bias=False).bfloat16()
    delta = WaveFT(coefficients=500).delta(Site(128, 128), weight_of(base), None, torch.Generator())
    x = torch.randn(256, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    for size in (1e-4, 1e-3, 1e-2):
        with torch.no_grad():
            delta.spectrum.normal_(std=size, generator=torch.Generator().manual_seed(2))
            whole = delta.update(delta.spectrum)
            exact = x.double() @ (base.weight.double() + whole.double()).T
            at_once = delta(x, weight_of(base), None)
            by_two = (x @ base.weight.T).addmm_(x, whole.bfloat16().T)
        assert (at_once - exact).norm() <= (by_two - exact).norm()


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"coefficients": 0}, "coefficients must be at least 1, not 0", ""),
        ({"coefficients_pattern": {"mlp": -1}}, "at least 1, not -1", ""),
        ({"scaling": -1.0}, "scaling must be a positive number", ""),
        ({"wavelet": "db39"}, "no wavelet named 'db39'", "db38"),
        ({"wavelet": "haar"}, "no wavelet named 'haar'", r"db1 \(Haar\)"),
    ],
)
def test_bad_hyperparameters_are_refused(options: dict, message: str, hint: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        WaveFT(**options)
    assert hint.replace("\\", "") in caught.value.hint


def test_more_coefficients_than_entries_are_refused_with_the_largest_count() -> None:
    with pytest.raises(UserError, match="a 20×12 weight has no place for 2592 coefficients") as caught:
        WaveFT().check(Site(20, 12))
    assert "240" in caught.value.hint
    WaveFT(coefficients=240).check(Site(20, 12))


def test_what_peft_would_read_otherwise_is_refused() -> None:
    for wavelet in set(pefts_wavelets()) & set(WAVELET_REDUCTIONS):
        theirs, true = PeftWavelet(wavelet), pywt.Wavelet(wavelet)
        same = len(theirs) == true.rec_len and np.allclose(theirs.rec_lo, true.rec_lo, atol=1e-9)
        if same:
            assert WaveFT.from_peft({"wavelet_family": wavelet}).wavelet == wavelet
        else:
            with pytest.raises(UserError, match=f"PEFT's filters of {wavelet}"):
                WaveFT.from_peft({"wavelet_family": wavelet})


def test_pefts_proportional_counts_are_refused() -> None:
    with pytest.raises(UserError, match="proportional_parameters=True"):
        WaveFT.from_peft({"peft_type": "WAVEFT", "proportional_parameters": True})
