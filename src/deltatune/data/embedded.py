"""The data sets that need no hub: each has one fixed split, and comes from a pinned package or with Python itself."""

import bz2
import csv
import hashlib
from collections.abc import Callable

from deltatune.data.dialogues import DialogueData
from deltatune.data.docstrings import docstrings
from deltatune.data.examples import Split, TextData
from deltatune.data.splits import distinct_rows
from deltatune.packages import ROTTEN_TOMATOES, fetch


def rotten_tomatoes() -> TextData:
    """Review snippets by critics, fresh or rotten; all snippets on one film are in the same split."""
    file = fetch(ROTTEN_TOMATOES) / "reviews.csv.bz2"
    labels = ("rotten", "fresh")
    with bz2.open(file, "rt", encoding="utf-8", newline="") as lines:
        # The rest are plots: they tell of a film and do not judge it.
        reviews = [row for row in csv.DictReader(lines) if row["category"] in labels]
    whole = Split([row["text"] for row in reviews], [labels.index(row["category"]) for row in reviews])
    once = distinct_rows(whole)
    rows: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for row in once:
        rows[_split_of_film(reviews[row]["movie_name"])].append(row)
    return TextData(
        name=ROTTEN_TOMATOES.name,
        revision=ROTTEN_TOMATOES.revision,
        labels=labels,
        train=whole.take(rows["train"]),
        validation=whole.take(rows["validation"]),
        test=whole.take(rows["test"]),
        text=("text",),
        label="category",
        splitting="divided by film (about 80/10/10, by the SHA-256 of its name), so that no film is in two splits",
        duplicates=len(whole) - len(once),
    )


def _split_of_film(film: str) -> str:
    bucket = int(hashlib.sha256(film.encode()).hexdigest(), 16) % 10
    return {8: "validation", 9: "test"}.get(bucket, "train")


EMBEDDED: dict[str, Callable[[], TextData | DialogueData]] = {
    "rotten-tomatoes": rotten_tomatoes,
    "docstrings": docstrings,
}
