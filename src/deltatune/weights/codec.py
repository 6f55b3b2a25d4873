"""Encoding a weight into a storage and decoding it again.

A weight is flattened row by row and cut into blocks; each has the largest magnitude of its numbers as its scale. A code
is the level nearest to a number over its scale. With double quantisation the scales, less their mean, are stored in
the same manner in 8 bits, 256 to a block (Dettmers et al. 2023, arXiv 2305.14314, section 3). Codes and scales of nf4
and fp4 are those of bitsandbytes bit for bit, so what it computes on a CPU is followed to the last rounding.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from deltatune import kernels
from deltatune.errors import UserError
from deltatune.weights import dynamic_map, kernel
from deltatune.weights.levels import levels
from deltatune.weights.storage import BITS, DENSE, SCALE_BLOCK, Storage, parse_storage

_TILE = 1 << 17
"""Numbers that are decoded at a time: what is written for them stays in a core's cache."""
_CHUNK = 1 << 17
"""Numbers that are encoded at a time, for the same reason, and so that little memory is needed besides."""


class Packed(NamedTuple):
    """The tensors that store one weight. `Storage.layout` has their shapes."""

    codes: Tensor
    """The codes, packed into bytes, the first in the highest bits; the numbers themselves for bf16 and fp32."""
    scales: Tensor | None = None
    """One for each block: fp32, or the 8-bit code of it."""
    coarse: Tensor | None = None
    """Of 8-bit scales, the scale of each 256."""
    offset: Tensor | None = None
    """Of 8-bit scales, their mean."""


def encode(weight: Float[Tensor, "out in"], storage: Storage) -> Packed:
    """Stores a weight of any floating type. Raises `UserError` where a value is not finite."""
    flat = weight.detach().reshape(-1)
    if storage.format in DENSE:
        _refuse_non_finite(flat.abs().amax())
        return Packed(flat.to(DENSE[storage.format], copy=True))
    shape, dtype = storage.layout(flat.numel())["codes"]
    codes = torch.empty(shape, dtype=dtype, device=flat.device)
    scales, stored = [], 0
    for numbers in flat.split(_CHUNK):  # type: ignore[no-untyped-call]
        scaled, largest = _scaled(numbers.float(), storage.block)
        _refuse_non_finite(largest)
        part = _codes(scaled, storage)
        codes[stored : stored + len(part)] = part
        stored += len(part)
        scales.append(largest)
    every = torch.cat(scales)
    return Packed(codes, *encode_scales(every)) if storage.double else Packed(codes, every)


def encode_scales(
    scales: Float[Tensor, " blocks"],
) -> tuple[UInt8[Tensor, " blocks"], Float[Tensor, " coarse"], Float[Tensor, ""]]:
    """The 8-bit codes of the scales less their mean, the scale of each 256 codes, and the mean."""
    offset = scales.mean()
    scaled, coarse = _blocks(scales - offset, SCALE_BLOCK)
    scaled = (scaled * (1 / coarse[:, None])).clamp_(-1, 1).flatten()[: len(scales)]
    # bitsandbytes looks a number up in a table of 65,536 of them. A block of zeros has the first code.
    index = ((scaled + 1) * 0.5 * 65535 + 0.5).nan_to_num(0).long()
    return _nearest_in_map().to(scales.device)[index], coarse, offset


def decode_scales(packed: Packed) -> Float[Tensor, " blocks"]:
    """The scale of each block in fp32."""
    codes, coarse, offset = packed.scales, packed.coarse, packed.offset
    assert codes is not None
    if coarse is None or offset is None:
        return codes
    scales, whole = dynamic_map.levels(True, codes.device).index_select(0, codes.int()), len(codes) // SCALE_BLOCK
    scales[: whole * SCALE_BLOCK].view(whole, SCALE_BLOCK).mul_(coarse[:whole, None])
    scales[whole * SCALE_BLOCK :].mul_(coarse[whole:])
    return scales.add_(offset)


def codes_of(packed: Packed, storage: Storage) -> kernels.Codes:
    """A weight in fewer bits, as the compiled loops take it; without numbers, without tables either."""
    codes, scales, coarse, offset = packed
    assert scales is not None
    map = level = None
    if not codes.is_meta:
        map = dynamic_map.levels(True, codes.device)
        level = None if storage.format == "int8" else levels(storage.format)
    return kernels.Codes(codes, scales, coarse, offset, map, level, storage.block, BITS[storage.format])


def decode(
    packed: Packed, storage: Storage, out: Float[Tensor, " numbers"], start: int = 0
) -> Float[Tensor, " numbers"]:
    """Fills `out`, of any floating type, with the weight's numbers from place `start` on, and returns it.

    `start` has to be a multiple of `aligned(storage)`. The numbers are computed in fp32 and rounded once, everywhere to
    the same bits, but for results in bf16 so small that they have no full precision there (below 2⁻¹²⁶): a compiled
    loop can make them 0. On a CPU there is one for all formats (`kernels`), on CUDA an operator for some (`kernel`).
    """
    torch.ops.deltatune.decode_(*packed, str(storage), out, start)
    return out


def _decode(
    codes: Tensor,
    scales: Tensor | None,
    coarse: Tensor | None,
    offset: Tensor | None,
    words: str,
    out: Float[Tensor, " numbers"],
    start: int,
) -> None:
    packed, storage = Packed(codes, scales, coarse, offset), _storage(words)
    if storage.format in DENSE:
        out.copy_(codes[start : start + len(out)])
        return
    bits, place = BITS[storage.format], start // storage.block
    if kernels.ready(out) and out.is_contiguous():
        kernels.decode(codes_of(packed, storage), out, start)
        return
    scales = decode_scales(packed)
    if storage.format == "int8":
        scales = scales / 127
    done = kernel.decode_blocks(storage.format, packed.codes[start * bits // 8 :], scales[place:], out, storage.block)
    tile = len(out) if out.is_cuda else _TILE
    for first in range(done, len(out), tile):
        part = out[first : first + tile]
        values = _levels_of(packed.codes, storage, start + first, len(part))
        _scale(values, scales[(start + first) // storage.block :], storage.block)
        part.copy_(values)


_storage = lru_cache(parse_storage)

# Operations of PyTorch's like any other, so that what sees those (a profiler, a plan) sees these as one each.
_operations = torch.library.Library("deltatune", "DEF")  # type: ignore[no-untyped-call]
_operations.define(  # type: ignore[no-untyped-call]
    "decode_(Tensor codes, Tensor? scales, Tensor? coarse, Tensor? offset, str storage, Tensor(a!) out, int start)"
    " -> ()"
)
_operations.impl("decode_", _decode, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


def aligned(storage: Storage) -> int:
    """Places at which decoding can start are multiples of this: whole blocks in whole bytes."""
    return 1 if storage.format in DENSE else storage.block


def _levels_of(codes: Tensor, storage: Storage, start: int, count: int) -> Float[Tensor, " count"]:
    """What `count` codes from place `start` on stand for, in fp32."""
    if storage.format == "int8":
        return codes[start : start + count].float()
    group, bits = storage.group, BITS[storage.format]
    first, last = start // group, -(-(start + count) // group)
    part = codes[first * group * bits // 8 : last * group * bits // 8]
    if bits == 3:  # three bytes are two numbers of four codes each
        high, middle, low = part.view(-1, 3).int().unbind(1)
        whole = (high << 16) | (middle << 8) | low
        index = torch.stack((whole >> 12, whole & 0xFFF), 1).view(-1)
    else:
        index = part.int()
    found = _table(storage.format, codes.device).index_select(0, index)
    return (torch.view_as_real(found) if found.is_complex() else found).view(-1).view(torch.float32)[:count]


@lru_cache
def _table(format: str, device: torch.device) -> Tensor:
    """The levels of every 2 codes of four bits, or every 4 of fewer, side by side in one wide number.

    So one lookup gives 2 or 4 levels: that is what makes decoding fast without a kernel of its own.
    """
    bits = BITS[format]
    width = 2 if bits == 4 else 4
    index = torch.arange(2 ** (bits * width))
    each = torch.stack([(index >> (bits * (width - 1 - place))) & (2**bits - 1) for place in range(width)], 1)
    return levels(format)[each].contiguous().view(torch.float64 if width == 2 else torch.complex128).view(-1).to(device)


@lru_cache
def _nearest_in_map() -> UInt8[Tensor, "65536"]:
    """The code of the dynamic map that is nearest to each of 65,536 even steps from −1 to 1."""
    places = dynamic_map.levels(True, torch.device("cpu"))
    return torch.bucketize(2 * torch.arange(65536.0) / 65535 - 1, (places[:-1] + places[1:]) / 2).to(torch.uint8)


def _scale(values: Float[Tensor, " numbers"], scales: Float[Tensor, " blocks"], block: int) -> None:
    """Multiplies each block by its scale, in place; the last block may be short."""
    whole = len(values) // block
    values[: whole * block].view(whole, block).mul_(scales[:whole, None])
    if whole * block < len(values):
        values[whole * block :].mul_(scales[whole])


def _blocks(
    numbers: Float[Tensor, " numbers"], block: int
) -> tuple[Float[Tensor, "blocks block"], Float[Tensor, " blocks"]]:
    """The numbers in blocks, the last filled up with zeros, and the largest magnitude of each."""
    blocks = F.pad(numbers, (0, -len(numbers) % block)).view(-1, block)
    return blocks, blocks.abs().amax(1)


def _scaled(
    numbers: Float[Tensor, " numbers"], block: int
) -> tuple[Float[Tensor, " numbers"], Float[Tensor, " blocks"]]:
    """Each number over the largest magnitude of its block, and these."""
    blocks, largest = _blocks(numbers, block)
    scaled = (blocks * (1 / largest.clamp(min=1e-38))[:, None]).clamp_(-1, 1).flatten()[: len(numbers)]
    if short := len(numbers) % block:  # bitsandbytes divides here
        largest[-1].clamp_(min=1e-38)
        scaled[-short:] = (numbers[-short:] / largest[-1]).clamp_(-1, 1)
    return scaled, largest


def _codes(scaled: Float[Tensor, " numbers"], storage: Storage) -> Integer[Tensor, " bytes"]:
    """The packed codes of numbers from −1 to 1; of two levels as near the lower one."""
    if storage.format == "int8":
        return (scaled * 127).round_().to(torch.int8)
    scaled = F.pad(scaled, (0, -len(scaled) % storage.group))
    level = levels(storage.format)
    order = torch.argsort(level, stable=True)
    middles = (level[order][:-1] + level[order][1:]) / 2
    below, above = torch.zeros_like(scaled), torch.empty_like(scaled)
    for middle in middles.tolist():  # what `bucketize` counts, in a quarter of its time
        below.add_(torch.gt(scaled, middle, out=above))
    codes = below.int()
    if storage.format == "fp4":  # the one whose codes are not in the order of their levels
        codes = order.int().to(codes.device)[codes]
    return _pack(codes, storage)


def _pack(codes: Integer[Tensor, " numbers"], storage: Storage) -> UInt8[Tensor, " bytes"]:
    """Codes as bytes, the first in the highest bits."""
    bits, group = BITS[storage.format], storage.group
    groups = codes.view(-1, group)
    whole = sum(groups[:, place] << (bits * (group - 1 - place)) for place in range(group))
    assert isinstance(whole, Tensor)
    size = group * bits // 8
    return (
        torch.stack([(whole >> (8 * (size - 1 - place))) & 0xFF for place in range(size)], 1).view(-1).to(torch.uint8)
    )


def _refuse_non_finite(largest: Tensor) -> None:
    if not torch.isfinite(largest).all():
        raise UserError("it has values that are not finite", "the file is damaged, or the model diverged")
