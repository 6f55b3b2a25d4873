"""The checker of signatures: beartype, with an int welcome where a float is asked for, as everywhere in Python."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable) -> Callable:
    """Checks what a function is given, or what it returns.

    jaxtyping has two functions made of each signature. The first is shown the arguments and may return anything; the
    second is shown them again with what came out, and what the first found of shapes still holds: here it looks at the
    latter alone.
    """
    returns = function.__annotations__.get("return", Any)
    if returns is not Any:
        function.__annotations__ = {"return": returns}
    return _check(function)
