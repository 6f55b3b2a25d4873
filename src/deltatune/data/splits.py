"""Making the splits that a data set does not bring along."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Generic

from deltatune.data.dataset import P, Part, drawn
from deltatune.data.stratify import spread
from deltatune.errors import UserError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Splits(Generic[P]):
    """The three splits, and how they came about."""

    train: P
    validation: P
    test: P
    words: str
    duplicates: int = 0


def complete(given: Mapping[str, P], seed: int) -> Splits[P]:
    """The given splits, with a missing validation or test split made of a tenth of the training rows each.

    Duplicates are dropped from the training rows before they are divided, so that no made split repeats a training row;
    where nothing has to be made, everything stays as given.
    Raises UserError where there are too few training rows to divide.
    """
    missing = [name for name in SPLITS if name not in given]
    if not missing:
        return Splits(given["train"], given["validation"], given["test"], "train, validation and test as given")
    whole = given["train"]
    pool = whole.take(distinct_rows(whole, seen=(given[name] for name in given if name != "train")))
    order = spread(pool.strata, seed)
    size = max(1, (len(pool) + 5) // 10)
    splits = dict(given)
    for name in reversed(missing):
        splits[name] = pool.take(sorted(order[-size:]))
        order = order[:-size]
    if len(order) < max(1, len(set(pool.strata))):
        raise UserError(
            f"{len(pool)} different rows are too few to make {' and '.join(missing)} of",
            "give more rows, or files of your own named train, validation and test",
        )
    splits["train"] = pool.take(sorted(order))
    made = " and ".join(missing)
    words = f"{made} made of a tenth of the {len(pool)} different training rows each, {drawn(pool, seed)}"
    return Splits(splits["train"], splits["validation"], splits["test"], words, len(whole) - len(pool))


def distinct_rows(split: Part, seen: Iterable[Part] = ()) -> list[int]:
    """The rows whose key stands neither in an earlier row nor in the splits seen."""
    met = {key for other in seen for key in other.keys}
    rows = []
    for row, key in enumerate(split.keys):
        if key not in met:
            met.add(key)
            rows.append(row)
    return rows
