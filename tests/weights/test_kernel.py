"""bitsandbytes' kernel behind our decoding: the same bits with it and without it, and nothing where it is not known."""

import ctypes
from collections.abc import Iterator

import pytest
import torch

from deltatune.weights import Storage, kernel
from deltatune.weights.codec import decode, encode

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where bitsandbytes is not installed."""
    kernel._kernel.cache_clear()
    monkeypatch.setattr(kernel, "_library", lambda: None)
    yield
    kernel._kernel.cache_clear()


@pytest.fixture
def needed() -> None:
    if kernel._library() is None:
        pytest.skip("there is no kernel for this machine, or bitsandbytes is not installed")


def decoded(storage: Storage, dtype: torch.dtype, numbers: int, start: int = 0) -> torch.Tensor:
    weight = torch.randn(1, 40_010, generator=torch.Generator().manual_seed(0))
    return decode(encode(weight, storage), storage, torch.empty(numbers, dtype=dtype), start)


@TYPES
@pytest.mark.parametrize("block", [16, 64, 4096])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_it_decodes_to_the_bits_of_the_table(
    needed: None, request: pytest.FixtureRequest, format: str, block: int, dtype: torch.dtype
) -> None:
    cases = [(Storage(format, block, double), start) for double in (False, True) for start in (0, 4096)]
    fast = [decoded(storage, dtype, 40_010 - start, start) for storage, start in cases]
    request.getfixturevalue("without")
    assert kernel._kernel(format, dtype, torch.device("cpu")) is None
    for found, (storage, start) in zip(fast, cases, strict=True):
        assert torch.equal(found, decoded(storage, dtype, 40_010 - start, start))


@TYPES
def test_it_has_whole_blocks_of_four_bits_on_a_cpu(needed: None, dtype: torch.dtype) -> None:
    def done(format: str, out: torch.Tensor) -> int:
        return kernel.decode_blocks(format, torch.zeros(100, dtype=torch.uint8), torch.ones(3), out, 64)

    assert done("nf4", torch.empty(130, dtype=dtype)) == 128
    assert done("nf4", torch.empty(50, dtype=dtype)) == 0
    assert done("nf3", torch.empty(130, dtype=dtype)) == 0
    assert done("nf4", torch.empty(130, dtype=torch.float64)) == 0
    assert done("nf4", torch.empty(130, dtype=dtype, device="meta")) == 0
    assert done("nf4", torch.empty(260, dtype=dtype)[::2]) == 0


def test_without_bitsandbytes_there_is_no_kernel(without: None) -> None:
    assert kernel.decode_blocks("nf4", torch.zeros(32, dtype=torch.uint8), torch.ones(1), torch.empty(64), 64) == 0


def test_a_release_that_is_not_known_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_RELEASES", ("none",))
    monkeypatch.setattr(ctypes, "CDLL", lambda path: pytest.fail("it was loaded"))
    assert kernel._library.__wrapped__() is None


def test_a_kernel_that_gives_other_numbers_is_not_used() -> None:
    def wrong(codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, block: int) -> None:
        out.fill_(1.0)

    assert not kernel._decodes(wrong, "nf4", torch.float32, torch.device("cpu"))


@TYPES
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_the_operator_that_cuda_uses_gives_the_bits_of_the_table_here_too(format: str, dtype: torch.dtype) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    assert kernel._decodes(kernel._operator(format, dtype), format, dtype, torch.device("cpu"))
