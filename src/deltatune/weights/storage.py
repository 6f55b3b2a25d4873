"""How the numbers of a frozen weight are stored, in the user's words: `nf4`, `nf4:block=128,double=false`, `int8`."""

import math
from dataclasses import dataclass, fields
from typing import Literal, cast, get_args

import torch

from deltatune.errors import UserError, unknown
from deltatune.words import parse

Format = Literal["nf4", "fp4", "nf3", "nf2", "int8", "bf16", "fp32"]

FORMATS: tuple[Format, ...] = get_args(Format)
BITS = {"nf4": 4, "fp4": 4, "nf3": 3, "nf2": 2, "int8": 8, "bf16": 16, "fp32": 32}
"""Bits of one weight's code."""
DENSE = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""The formats that store the numbers themselves, without scales."""
SCALE_BLOCK = 256
"""Scales that share one scale of their own in double quantisation (arXiv 2305.14314, section 3)."""

_LARGEST = 4096


@dataclass(frozen=True)
class Storage:
    """A format and its options. Raises `UserError` for a format that does not exist and for a block that is none."""

    format: Format
    """nf4, fp4, nf3, nf2, int8, bf16 or fp32."""
    block: int = 64
    """Weights that share one scale: a power of two from 16 to 4096."""
    double: bool = True
    """Whether the scales are stored in 8 bits themselves (double quantisation)."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise unknown("storage", str(self.format), FORMATS)
        block = self.block
        if type(block) is not int or not 16 <= block <= _LARGEST or block & (block - 1):
            raise UserError(
                f"{self.format}: block must be a power of two from 16 to {_LARGEST}, not {block!r}",
                "64 is usual: larger blocks take less memory, smaller ones lose less",
            )
        if type(self.double) is not bool:
            raise UserError(f"{self.format}: double must be true or false, not {self.double!r}")

    def __str__(self) -> str:
        """The words that give this storage, every option written out."""
        if self.format in DENSE:
            return self.format
        return f"{self.format}:block={self.block},double={str(self.double).lower()}"

    @property
    def group(self) -> int:
        """Codes that fill whole bytes together."""
        return {4: 2, 3: 8, 2: 4}.get(BITS[self.format], 1)

    def layout(self, numel: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each tensor that stores a weight of `numel` numbers, by name; see `codec.Packed`."""
        if self.format in DENSE:
            return {"codes": ((numel,), DENSE[self.format])}
        groups, blocks = math.ceil(numel / self.group), math.ceil(numel / self.block)
        code = torch.int8 if self.format == "int8" else torch.uint8
        codes = {"codes": ((groups * self.group * BITS[self.format] // 8,), code)}
        if not self.double:
            return {**codes, "scales": ((blocks,), torch.float32)}
        return {
            **codes,
            "scales": ((blocks,), torch.uint8),
            "coarse": ((math.ceil(blocks / SCALE_BLOCK),), torch.float32),
            "offset": ((), torch.float32),
        }

    def nbytes(self, numel: int) -> int:
        """Bytes that a weight of `numel` numbers takes, scales included."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.layout(numel).values())


def parse_storage(words: str) -> Storage:
    """The storage that words such as `nf4:block=64,double=true` name; what is unknown is an error that names it."""
    name, options = parse(words)
    known = [field.name for field in fields(Storage) if field.name != "format"]
    for option in options:
        if option not in known:
            raise unknown(f"{name} option", option, known)
    if name in DENSE and options:
        raise UserError(f"{name} has no options", f"write {name} alone")
    return Storage(cast(Format, name), **options)
