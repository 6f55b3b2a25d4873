import json

import pytest

from deltatune.data import load_data
from deltatune.errors import UserError

ROWS = range(40)


@pytest.fixture
def load(tmp_path):
    """Loads columns, given as functions of the row, as a JSON lines file; further keywords go to load_data."""

    def load(columns, **options):
        rows = [{name: make(i) for name, make in columns.items()} for i in ROWS]
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return load_data(str(path), **options)

    return load


def words(i):
    return f"words {i}"


def parity(i):
    return i % 2


@pytest.mark.parametrize("text", ["text", "Sentence", "review", "content", "comment", "document"])
@pytest.mark.parametrize("label", ["label", "Category", "class", "sentiment", "target", "stars"])
def test_columns_are_found_by_their_names(load, text, label):
    data = load({"id": words, text: words, label: parity, "group": lambda i: "ab"[i % 2]})
    assert (data.text, data.label) == ((text,), label)


def test_columns_with_names_of_their_own_are_found_by_what_is_in_them(load):
    data = load({"klasse": lambda i: ["gut", "schlecht"][i % 2], "id": lambda i: i, "kommentar": words})
    assert (data.text, data.label) == (("kommentar",), "klasse")
    assert data.labels == ("gut", "schlecht")


def test_given_columns_are_used_even_where_others_have_the_usual_names(load):
    data = load({"text": words, "title": lambda i: f"title {i}", "label": parity, "level": lambda i: i % 3},
                text=("title",), label="level")  # fmt: skip
    assert data.train.texts[0].startswith("title")
    assert data.labels == ("0", "1", "2")


@pytest.mark.parametrize(
    "names",
    [
        ("premise", "hypothesis"),
        ("sentence1", "sentence2"),
        ("question1", "question2"),
        ("question", "sentence"),
        ("text", "text_pair"),
    ],
)
def test_pairs_are_found_by_their_usual_names(load, names):
    first, second = names
    data = load({"idx": lambda i: i, first: lambda i: f"a {i // 3}", second: lambda i: f"b {i}", "label": parity})
    assert data.text == names
    assert data.train.pairs is not None
    assert len(data.train.pairs) == len(data.train)
    assert data.train.pairs[0].startswith("b ")


def test_pairs_may_be_given(load):
    data = load({"frage": words, "antwort": lambda i: f"b {i}", "label": parity}, text=("antwort", "frage"))
    assert data.train.texts[0].startswith("b ")
    assert data.train.pairs is not None
    assert data.train.pairs[0].startswith("words ")


@pytest.mark.parametrize(
    ("label", "names"),
    [
        (lambda i: ["neg", "pos", "긍정"][i % 3], ("neg", "pos", "긍정")),
        (lambda i: [10, 9, -1][i % 3], ("-1", "9", "10")),
        (lambda i: i % 2 == 0, ("False", "True")),
        (lambda i: float(i % 2), ("0", "1")),
        (lambda i: str(i % 12 + 1), tuple(str(n) for n in range(1, 13))),
    ],
)
def test_labels_may_be_strings_integers_or_booleans(load, label, names):
    data = load({"text": words, "label": label})
    assert data.labels == names
    assert set(data.train.labels) == set(range(len(names)))


def test_classes_that_a_table_names_keep_their_names_and_order(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["world", "sports", "business", "arts"])})
    rows = [{"text": words(i), "label": [0, 1, 2, -1][i % 4]} for i in ROWS]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "news.parquet")
    data = load_data(str(tmp_path / "news.parquet"))
    assert data.labels == ("world", "sports", "business", "arts")
    assert set(data.train.labels) == {0, 1, 2}
    assert data.incomplete == 10  # -1 is a missing label


def test_rows_without_a_text_or_a_label_are_dropped_and_counted(load):
    data = load(
        {"text": lambda i: [None, "  ", ""][i] if i < 3 else words(i), "label": lambda i: parity(i) if i < 38 else None}
    )
    assert data.incomplete == 5
    assert len(data.train) + len(data.validation) + len(data.test) == 35


@pytest.mark.parametrize(
    ("columns", "options", "message", "hint"),
    [
        ({"text": words, "label": parity}, {"text": ("txt",)}, "no column 'txt'; there are 'text', 'label'", "'text'"),
        ({"text": words, "label": parity}, {"label": "lable"}, "no column 'lable'", "'label'"),
        ({"text": lambda i: i, "label": parity}, {}, "text column 'text' holds numbers, not text", "--text"),
        ({"text": str, "label": parity}, {}, "text column 'text' holds numbers, not text", "--text"),
        ({"text": lambda i: ["a"], "label": parity}, {"text": ("text",)}, "holds dates, lists or mixed", "--text"),
        (
            {"kommentar": words, "notiz": words, "label": parity},
            {},
            "could be the text: 'kommentar', 'notiz'",
            "--text",
        ),
        ({"text": words, "topic": parity, "intent": parity}, {}, "could be the label: 'intent', 'topic'", "--label"),
        ({"text": words, "other": words}, {}, "no column looks like labels", "--label"),
        ({"zahl": lambda i: i / 7, "label": parity}, {}, "no column holds text: 'zahl' holds numbers", "--text"),
        ({"text": words, "label": lambda i: i / 7}, {}, "'label' holds continuous numbers such as 0.14", "--label"),
        ({"text": words, "label": lambda i: i}, {}, "'label' has 40 different values in 40 rows", "--label"),
        ({"text": words, "label": lambda i: [i]}, {"label": "label"}, "'label' holds dates, lists or mixed", "--label"),
        ({"text": words, "label": lambda i: "yes"}, {}, "all 40 rows have the label 'yes'", "two labels"),
        ({"text": lambda i: "", "label": parity}, {}, "none of the 40 rows has a text in text", "--text"),
        ({"text": words, "label": lambda i: None}, {}, "none of the 40 rows has .* a label in label", "--label"),
        ({"text": words, "label": parity}, {"text": ("text",), "label": "text"}, "'text', 'text'", "--label"),
    ],
)
def test_columns_that_cannot_work_are_refused_with_a_hint(load, columns, options, message, hint):
    with pytest.raises(UserError, match=message) as error:
        load(columns, **options)
    assert hint in error.value.hint
    assert "data.jsonl" in error.value.message
