"""Bytes and seconds in the user's words."""

import re

from pydantic import ByteSize, TypeAdapter, ValidationError

from deltatune.errors import UserError

_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def read_bytes(words: str) -> int:
    """`4GB`, `500 MiB`, `1024` → bytes. Raises `UserError` for what is no size."""
    try:
        return int(TypeAdapter(ByteSize).validate_python(words))
    except ValidationError as error:
        raise UserError(f"'{words}' is no size", "write it as 4GB, 500MB or 1MiB") from error


def read_seconds(words: str) -> float:
    """`90`, `90s`, `10m`, `1.5h` → seconds. Raises `UserError` for what is no time."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", words)
    if match is None or match[2] not in _SECONDS or not float(match[1]):
        raise UserError(f"'{words}' is no time", "write it as 90s, 10m or 1.5h")
    return float(match[1]) * _SECONDS[match[2]]
