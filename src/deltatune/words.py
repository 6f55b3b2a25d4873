"""A name with options as it is written on a command line or in a file: `lora:rank=8,targets=[query, value]`."""

import re
from typing import Any

import yaml

from deltatune.errors import UserError


def parse(words: str) -> tuple[str, dict[str, Any]]:
    """Splits `name:option=value,…` into its name and options; values are read as YAML, so `[a, b]` is a list."""
    name, _, rest = words.partition(":")
    # Commas separate options only where a `key=` follows; the others belong to lists and regular expressions.
    pairs = re.split(r",(?=\s*\w+=)", rest) if rest else []
    return name.strip(), dict(parse_option(pair) for pair in pairs)


def parse_option(words: str) -> tuple[str, Any]:
    """Splits `option=value`; the value is read as YAML."""
    key, equals, value = words.partition("=")
    if not equals or not key.strip():
        raise UserError(f"'{words}' is not an option", "write it as name=value, such as rank=8")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        return key.strip(), value
