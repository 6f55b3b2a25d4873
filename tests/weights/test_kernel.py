"""Loops and operators behind our decoding: the same bits with them and without, and nothing where there is none."""

import pytest
import torch

from deltatune import kernels
from deltatune.weights import Storage, kernel
from deltatune.weights.codec import decode, encode

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def decoded(storage: Storage, dtype: torch.dtype, numbers: int, start: int = 0) -> torch.Tensor:
    weight = torch.randn(1, 40_010, generator=torch.Generator().manual_seed(0))
    return decode(encode(weight, storage), storage, torch.empty(numbers, dtype=dtype), start)


@pytest.mark.skipif(bool(kernels.missing()), reason=kernels.missing())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [16, 64, 4096])
@pytest.mark.parametrize("format", ["nf4", "fp4", "nf3", "nf2", "int8"])
def test_the_loop_decodes_to_the_bits_of_the_table(
    monkeypatch: pytest.MonkeyPatch, format: str, block: int, dtype: torch.dtype
) -> None:
    places = [(0, 40_010), (4096, 35_914), (4096, 33), (0, 7)]  # whole weights, parts of them, parts of a block
    cases = [(Storage(format, block, double), *place) for double in (False, True) for place in places]
    fast = [decoded(storage, dtype, count, start) for storage, start, count in cases]
    monkeypatch.setattr(kernels, "ready", lambda *tensors: False)
    for found, (storage, start, count) in zip(fast, cases, strict=True):
        assert torch.equal(found, decoded(storage, dtype, count, start))


@TYPES
def test_on_a_cpu_there_is_no_operator(dtype: torch.dtype) -> None:
    out = torch.empty(130, dtype=dtype)
    assert kernel.decode_blocks("nf4", torch.zeros(65, dtype=torch.uint8), torch.ones(3), out, 64) == 0


def test_an_operator_that_gives_other_numbers_is_not_used() -> None:
    def wrong(codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, block: int) -> None:
        out.fill_(1.0)

    assert not kernel._decodes(wrong, "nf4", torch.float32, torch.device("cpu"))


@TYPES
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_the_operator_that_cuda_uses_gives_the_bits_of_the_table_here_too(format: str, dtype: torch.dtype) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    assert kernel._decodes(kernel._operator(format, dtype), format, dtype, torch.device("cpu"))
