"""The dynamic map: its levels, and what codes lose."""

import pytest
import torch

from deltatune.weights import dynamic_map

CPU = torch.device("cpu")
SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def encoded(x: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    codes, absmax = torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x))
    dynamic_map.encode_(x.clone(), codes, absmax, dynamic_map.Scratch(x.numel(), CPU), signed=signed)
    return codes, absmax


def decoded(x: torch.Tensor, signed: bool) -> torch.Tensor:
    scratch = dynamic_map.Scratch(2 * x.numel(), CPU)
    return dynamic_map.decode_(*encoded(x, signed), torch.empty_like(x), scratch, signed=signed)


def spread(signed: bool) -> torch.Tensor:
    """Numbers of many orders of magnitude, in 40 blocks of 256."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 256, generator=generator) * 10 ** (-4 * torch.rand(40, 256, generator=generator))
    return x if signed else x.square()


def test_the_signed_levels_are_symmetric_around_zero_but_for_one() -> None:
    levels = dynamic_map.levels(True, CPU)
    assert len(levels.unique()) == 256
    assert levels[127] == 0
    assert levels[255] == 1
    assert torch.equal(-levels[:127].flip(0), levels[128:255])


def test_the_unsigned_levels_cover_each_decade_twice_as_densely_as_the_one_below() -> None:
    levels = dynamic_map.levels(False, CPU)
    assert levels[0] == 0
    counts = [int(((levels > 10.0**e) & (levels < 10.0 ** (e + 1))).sum()) for e in range(-7, 0)]
    assert counts == [2, 4, 8, 16, 32, 64, 128]


@SIGNED
def test_the_levels_are_those_of_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    assert torch.equal(dynamic_map.levels(signed, CPU), functional.create_dynamic_map(signed=signed))


@SIGNED
def test_a_code_is_the_level_nearest_to_the_number_over_its_scale_in_fp16(signed: bool) -> None:
    x = spread(signed)
    codes, absmax = encoded(x, signed)
    assert torch.equal(absmax, x.abs().amax(1))
    scaled = (x / absmax[:, None]).half().float()
    away = (scaled[..., None] - dynamic_map.levels(signed, CPU)).abs()
    chosen = away.gather(2, codes.long()[..., None])[..., 0]
    above = scaled > 2e-7  # below it the unsigned map has no zero
    assert above.sum() > 4000
    assert (chosen <= away.amin(2) * (1 + 1e-5))[above | torch.tensor(signed)].all()


@SIGNED
def test_levels_are_kept_as_they_are(signed: bool) -> None:
    x = 3 * dynamic_map.levels(signed, CPU)[None]
    x = x if signed else x[:, 1:]
    torch.testing.assert_close(decoded(x, signed), x, atol=0, rtol=1e-6)


def test_gaussian_numbers_lose_one_percent() -> None:
    x = torch.randn(400, 256, generator=torch.Generator().manual_seed(0))
    assert ((decoded(x, True) - x).norm() / x.norm()).item() == pytest.approx(0.011, abs=2e-4)


def test_no_second_moment_becomes_zero_beside_a_large_one() -> None:
    x = torch.full((1, 256), 1e-12)
    x[0, 0] = 1
    assert 0 < decoded(x, False)[0, 1] < 4e-7


@SIGNED
def test_a_block_of_zeros_stays_one(signed: bool) -> None:
    assert torch.equal(decoded(torch.zeros(2, 256), signed), torch.zeros(2, 256))
