"""Storages of a frozen weight: bitsandbytes' codes and scales, bits counted from memory, errors as published."""

import importlib.util

import pytest
import torch

from deltatune.errors import UserError
from deltatune.weights import FORMATS, QuantisedLinear, Storage, parse_storage, weight_of
from deltatune.weights.codec import aligned, decode, encode
from deltatune.weights.levels import NF4, levels, normal_float

STORAGES = [Storage(name, double=double) for name in FORMATS for double in (False, True)]
PACKED = [storage for storage in STORAGES if storage.format not in ("bf16", "fp32")]
every_storage = pytest.mark.parametrize("storage", STORAGES, ids=str)


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def decoded(weight: torch.Tensor, storage: Storage) -> torch.Tensor:
    return decode(encode(weight, storage), storage, torch.empty(weight.numel())).view_as(weight)


@pytest.fixture(scope="module")
def peer():
    """Bitsandbytes' own functions; that package takes seconds to import, so it is not imported where it is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    import bitsandbytes.functional

    return bitsandbytes.functional


AWKWARD = {
    "whole blocks": gaussian(64, 128),
    "a short block and an odd end": gaussian(7, 101),
    "fewer numbers than a block": gaussian(3, 5),
    "several chunks": gaussian(1031, 1029),
    "a block of zeros": torch.cat((torch.zeros(2, 64), gaussian(30, 64))),
    "ties between levels": (gaussian(64, 64) * 8).round() / 8,
    "in 16 bits": gaussian(30, 70).bfloat16(),
    "tiny": gaussian(16, 64) * 1e-39,
}


@pytest.mark.parametrize("weight", AWKWARD.values(), ids=AWKWARD.keys())
@pytest.mark.parametrize("block", [32, 64, 256])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_codes_and_scales_are_bitsandbytes_own_bit_for_bit(peer, format: str, block: int, weight: torch.Tensor) -> None:
    codes, plain = peer.quantize_4bit(weight, blocksize=block, quant_type=format)
    _, nested = peer.quantize_4bit(weight, blocksize=block, quant_type=format, compress_statistics=True)
    once, twice = encode(weight, Storage(format, block, False)), encode(weight, Storage(format, block, True))
    assert torch.equal(once.codes, codes.flatten())
    assert torch.equal(twice.codes, codes.flatten())
    assert torch.equal(once.scales, plain.absmax)
    assert torch.equal(twice.scales, nested.absmax)
    assert torch.equal(twice.coarse, nested.state2.absmax)
    assert torch.equal(twice.offset, nested.offset)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_gives_bitsandbytes_numbers_bit_for_bit(peer, format: str, dtype: torch.dtype) -> None:
    weight = gaussian(96, 128)
    codes, state = peer.quantize_4bit(weight.to(dtype), quant_type=format, compress_statistics=True)
    storage = Storage(format)
    ours = decode(encode(weight.to(dtype), storage), storage, torch.empty(weight.numel(), dtype=dtype))
    assert torch.equal(ours.view_as(weight), peer.dequantize_4bit(codes, state))


def test_the_construction_of_normal_float_gives_the_published_levels() -> None:
    torch.testing.assert_close(normal_float(4), torch.tensor(NF4), atol=3e-7, rtol=0)
    assert [len(levels(name)) for name in ("nf3", "nf2")] == [8, 4]


@pytest.mark.parametrize(
    ("words", "error"),
    [("nf4", 0.0925), ("nf4:double=false", 0.0925), ("fp4", 0.122), ("fp4:double=false", 0.122)],
)
def test_the_error_on_gaussian_weights_is_the_published_one(words: str, error: float) -> None:
    weight = gaussian(1024, 1024)
    relative = (decoded(weight, parse_storage(words)) - weight).norm() / weight.norm()
    assert relative.item() == pytest.approx(error, rel=0.01)


def test_more_bits_lose_less() -> None:
    weight = gaussian(256, 256)
    errors = [
        (decoded(weight, Storage(name)) - weight).norm() for name in ("nf2", "nf3", "nf4", "int8", "bf16", "fp32")
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


@pytest.mark.parametrize(
    ("words", "bits"),
    [("nf4", 4.127), ("nf4:double=false", 4.5), ("nf3", 3.127), ("nf2", 2.127), ("int8", 8.127), ("bf16", 16)],
)
def test_bits_a_weight_are_counted_from_the_bytes_in_memory(words: str, bits: float) -> None:
    layer = QuantisedLinear.of(torch.nn.Linear(1024, 1024, bias=False), parse_storage(words))
    held = sum(tensor.untyped_storage().nbytes() for tensor in layer.state_dict().values())
    assert held == weight_of(layer).nbytes == layer.storage.nbytes(1024 * 1024)
    assert 8 * held / 1024**2 == pytest.approx(bits, abs=5e-4)


@every_storage
@pytest.mark.parametrize("shape", [(64, 128), (7, 101), (3, 5)], ids=str)
def test_what_is_held_is_what_the_shape_says(storage: Storage, shape: tuple[int, int]) -> None:
    packed = encode(gaussian(*shape), storage)
    held = {name: (tuple(t.shape), t.dtype) for name, t in packed._asdict().items() if t is not None}
    assert held == storage.layout(shape[0] * shape[1])


@every_storage
def test_decoding_can_start_at_any_aligned_place(storage: Storage) -> None:
    weight = gaussian(300, 501)
    packed, start = encode(weight, storage), 29 * aligned(storage)
    part = decode(packed, storage, torch.empty(3001), start)
    assert torch.equal(part, decoded(weight, storage).flatten()[start : start + 3001])


@pytest.mark.parametrize("storage", PACKED, ids=str)
def test_encoding_what_was_decoded_changes_little(storage: Storage) -> None:
    once = decoded(gaussian(64, 64), storage)
    assert (decoded(once, storage) - once).norm() < 0.02 * once.norm()


@every_storage
def test_a_weight_that_is_not_finite_is_refused(storage: Storage) -> None:
    for bad in (torch.nan, torch.inf):
        weight = gaussian(8, 64)
        weight[3, 5] = bad
        with pytest.raises(UserError, match="not finite"):
            encode(weight, storage)


def test_a_storage_is_written_as_it_is_read() -> None:
    assert all(parse_storage(str(storage)) == storage for storage in PACKED)
    assert str(parse_storage("nf4")) == "nf4:block=64,double=true"
    assert str(parse_storage("bf16")) == "bf16"


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ("nf5", "no storage named 'nf5'", "nf4"),
        ("nf4:block=0", "power of two", "64"),
        ("nf4:block=48", "power of two", "64"),
        ("nf4:block=true", "power of two", "64"),
        ("nf4:blocks=64", "no nf4 option named 'blocks'", "block"),
        ("nf4:double=2", "true or false", ""),
        ("bf16:block=64", "bf16 has no options", "alone"),
        ("nf4:block", "not an option", "name=value"),
    ],
)
def test_a_storage_that_is_none_is_refused_in_the_users_words(words: str, message: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_storage(words)
    assert message in caught.value.message
    assert hint in caught.value.hint
