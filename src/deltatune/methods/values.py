"""What several methods ask of their hyperparameters, with errors that name the method and the value."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from deltatune.errors import UserError
from deltatune.methods.contract import Site


def at_least_one(method: str, **values: int | Iterable[int]) -> None:
    """Raises `UserError` for a count below 1; several of one name, such as those of a pattern, are given together."""
    for name, given in values.items():
        for value in given if isinstance(given, Iterable) else (given,):
            if value < 1:
                raise UserError(f"{method}: {name} must be at least 1, not {value}")


def positive(method: str, **values: float | Iterable[float | None] | None) -> None:
    """Raises `UserError` for a number that is not finite or not above 0; None stands for one that is left out.

    Several of one name are given together.
    """
    for name, given in values.items():
        for value in given if isinstance(given, Iterable) else (given,):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"{method}: {name} must be a positive number, not {value}")


def share(method: str, **values: float) -> None:
    """Raises `UserError` for a number outside of [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise UserError(f"{method}: {name} must be at least 0 and below 1, not {value}")


def rank_fits(method: str, rank: int, site: Site) -> None:
    """Raises `UserError` for a rank above min(out, in): a product of that width could not use it."""
    most = min(site.out, site.in_)
    if rank > most:
        raise UserError(
            f"{method}: rank {rank} is more than a {site.out}×{site.in_} weight has", f"the largest is {most}"
        )


def divides_both(method: str, site: Site, **lengths: int) -> None:
    """Raises `UserError` for a length that does not divide both out and in, with the nearest that do."""
    common = math.gcd(site.out, site.in_)
    for name, length in lengths.items():
        if common % length:
            divisors = (divisor for divisor in range(1, common + 1) if common % divisor == 0)
            near = sorted(divisors, key=lambda divisor: abs(divisor - length))[:3]
            raise UserError(
                f"{method}: {name} {length} does not divide both sides of a {site.out}×{site.in_} weight",
                f"the nearest that fit: {', '.join(map(str, near))}",
            )


def whole(title: str, config: Mapping[str, Any], field: str) -> int:
    """A count that an adapter_config.json must give; raises `UserError` where it does not."""
    value = config.get(field)
    if not isinstance(value, int) or value < 1:
        raise UserError(f"this {title} adapter has {field}={value!r}, which is no number of them", "it is not complete")
    return value


def refuse_unsupported(title: str, config: Mapping[str, Any], plain: Mapping[str, Any]) -> None:
    """Raises `UserError` where a field of an adapter_config.json has another value than the plain one."""
    for key, value in plain.items():
        if config.get(key, value) != value:
            raise UserError(
                f"this {title} adapter has {key}={config[key]!r}, which is not supported", f"only {value!r} is"
            )
