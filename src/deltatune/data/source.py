"""What is common to data from files and from the hub: tables by split, not yet read as texts and labels."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

# A split goes by the first of its names that is there.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val", "validation_matched"),
    "test": ("test", "testing", "test_matched"),
}


@dataclass(frozen=True)
class Source:
    """Tables by split ("train" is always there), and the revision that they were read at."""

    tables: dict[str, "Dataset"]
    revision: str


def split_roles(names: Iterable[str]) -> dict[str, str]:
    """Which of the names serves as which split: {"train": "train", "validation": "dev"}. A sole one is for training."""
    names = list(names)
    if len(names) == 1:
        return {"train": names[0]}
    here = {name.lower(): name for name in names}
    found = {split: [here[name] for name in known if name in here] for split, known in SPLIT_NAMES.items()}
    return {split: candidates[0] for split, candidates in found.items() if candidates}


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Keeps `datasets` from drawing progress bars and logging on stderr, and restores both afterwards."""
    import datasets

    level = datasets.logging.get_verbosity()
    bars = datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def last_cause(error: BaseException) -> str:
    """The first line of what went wrong underneath: libraries wrap it in errors that say little."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
