from collections import Counter

import pytest

from deltatune.data import Split, TextData, load_data
from deltatune.data.splits import complete
from deltatune.data.stratify import spread
from deltatune.errors import UserError


def split(labels, prefix="t") -> Split:
    return Split([f"{prefix} {i}" for i in range(len(labels))], list(labels))


def write(path, labels, prefix="t") -> None:
    lines = [f"{prefix} {i},{label}\n" for i, label in enumerate(labels)]
    path.write_text("text,label\n" + "".join(lines), encoding="utf-8")


def test_every_beginning_holds_the_labels_in_proportion():
    labels = [0] * 700 + [1] * 200 + [2] * 100
    order = spread(labels, seed=0)
    assert sorted(order) == list(range(1000))
    for count in (50, 100, 500, 800):
        taken = Counter(labels[row] for row in order[:count])
        for label, share in enumerate((0.7, 0.2, 0.1)):
            assert abs(taken[label] - share * count) <= 2


def test_the_rarest_label_comes_early():
    labels = [0] * 998 + [1, 2]
    assert {labels[row] for row in spread(labels, seed=5)[:3]} == {0, 1, 2}


def test_the_order_is_the_same_on_every_machine_and_another_with_another_seed():
    labels = [0, 1] * 6
    assert spread(labels, seed=0) == [7, 4, 9, 10, 3, 8, 2, 5, 6, 11, 0, 1]
    assert spread(labels, seed=1) != spread(labels, seed=0)


def test_one_set_is_divided_eighty_ten_ten_in_its_own_order():
    splits = complete({"train": split([0, 1, 1, 1] * 50)}, seed=0)
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [160, 20, 20]
    for part in (splits.train, splits.validation, splits.test):
        assert Counter(part.labels)[0] == pytest.approx(len(part) / 4, abs=1)
        assert part.texts == sorted(part.texts, key=lambda text: int(text.split()[1]))
    assert "validation and test made of a tenth of the 200 different training rows each" in splits.words


@pytest.mark.parametrize("missing", ["validation", "test"])
def test_a_missing_split_is_made_of_a_tenth_of_the_training_rows(missing):
    other = {"validation": "test", "test": "validation"}[missing]
    given = {"train": split([0, 1] * 50), other: split([0, 1] * 4, "other")}
    splits = complete(given, seed=0)
    assert getattr(splits, other) == given[other]
    assert (len(getattr(splits, missing)), len(splits.train)) == (10, 90)


def test_splits_that_are_all_given_stay_as_they_are():
    given = {name: Split(["same"] * 4, [0, 1] * 2) for name in ("train", "validation", "test")}
    splits = complete(given, seed=0)
    assert splits.train == given["train"]
    assert splits.duplicates == 0


def test_no_text_of_training_comes_again_in_a_split_that_was_made():
    rows = split([0, 1] * 50)
    twice = Split([*rows.texts, *(f" {text} " for text in rows.texts)], rows.labels * 2)
    splits = complete({"train": twice, "validation": split([0, 1], "t")}, seed=0)
    assert splits.duplicates == 102
    assert not {text.strip() for text in splits.train.texts} & {text.strip() for text in splits.test.texts}


def test_a_text_in_two_different_pairs_is_no_duplicate():
    splits = complete({"train": Split(["same"] * 20, [0, 1] * 10, [str(i) for i in range(20)])}, seed=0)
    assert splits.duplicates == 0
    assert splits.test.pairs is not None
    assert len(splits.test.pairs) == 2


def test_too_few_rows_to_divide_are_refused():
    with pytest.raises(UserError, match="2 different rows are too few to make validation and test of"):
        complete({"train": split([0, 1])}, seed=0)


def test_another_seed_draws_other_rows(tmp_path):
    write(tmp_path / "data.csv", [i % 2 for i in range(100)])
    first, again, other = (load_data(str(tmp_path / "data.csv"), seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.test.texts != other.test.texts


@pytest.mark.parametrize("secret", ["-1", ""])
def test_a_test_split_whose_labels_are_secret_counts_as_missing(tmp_path, secret):
    write(tmp_path / "train.csv", [i % 2 for i in range(100)])
    write(tmp_path / "test.csv", [secret] * 10, "secret")
    data = load_data(str(tmp_path))
    assert (len(data.train), len(data.validation), len(data.test)) == (80, 10, 10)
    assert data.splitting.endswith("the test split that came along has no labels")


def test_a_test_split_without_a_label_column_counts_as_missing(tmp_path):
    write(tmp_path / "train.csv", [i % 2 for i in range(100)])
    (tmp_path / "test.csv").write_text("text\nsecret\n")
    assert len(load_data(str(tmp_path)).test) == 10


def test_minus_one_is_a_label_where_training_has_it(tmp_path):
    write(tmp_path / "train.csv", [i % 3 - 1 for i in range(90)])
    write(tmp_path / "test.csv", [-1, -1], "new")
    assert load_data(str(tmp_path)).test.labels == [0, 0]


@pytest.mark.parametrize("name", ["validation", "test"])
def test_labels_that_training_does_not_have_are_named_with_their_first_row(tmp_path, name):
    write(tmp_path / "train.csv", ["neg", "pos"] * 20)
    write(tmp_path / f"{name}.csv", ["pos", "", "neutral", "neutral", "odd"])
    with pytest.raises(
        UserError, match=rf"\({name}\).*'neutral' \(first in row 3\), 'odd' \(first in row 5\)"
    ) as error:
        load_data(str(tmp_path))
    assert "training has neg, pos" in error.value.hint


def test_a_validation_split_without_the_label_column_is_refused(tmp_path):
    write(tmp_path / "train.csv", [i % 2 for i in range(100)])
    (tmp_path / "dev.csv").write_text("text,lable\nsome,1\n")
    with pytest.raises(UserError, match=r"\(validation\): there is no column 'label'; there are 'text', 'lable'"):
        load_data(str(tmp_path))


@pytest.fixture
def data():
    parts = [split([0, 0, 1, 2] * 25, name) for name in ("train", "validation", "test")]
    return TextData("data", "1", ("a", "b", "c"), *parts, text=("text",), label="label", splitting="as given")


def test_a_limit_takes_a_subset_with_each_labels_share_in_the_order_of_the_file(data):
    small = data.limited(40, 20, None, seed=0)
    assert (len(small.train), len(small.validation), len(small.test)) == (40, 20, 100)
    assert Counter(small.train.labels) == {0: 20, 1: 10, 2: 10}
    assert small.train.texts == sorted(small.train.texts, key=lambda text: int(text.split()[1]))
    assert small.splitting == ("as given; limited to 40 train, 20 validation and 100 test rows, stratified, seed 0")
    assert small == data.limited(40, 20, None, seed=0)
    assert small != data.limited(40, 20, None, seed=1)


def test_a_limit_above_what_there_is_changes_nothing(data):
    assert data.limited(1000, None, 100, seed=0) == data


@pytest.mark.parametrize("limit", [-1, 0, 2])
def test_a_limit_below_the_number_of_labels_is_refused(data, limit):
    with pytest.raises(UserError, match=f"a limit of {limit} on the train rows leaves out labels: there are 3"):
        data.limited(limit, None, None, seed=0)
