import json

import pytest

from deltatune.data import load_data
from deltatune.errors import UserError
from deltatune.files import sha256

KOREAN = [{"text": f"영화 {i}번은, 정말 좋다", "label": i % 2} for i in range(40)]


def write(path, rows):
    """Writes rows in the format of the path's ending."""
    names = list(rows[0])
    if path.suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        separator, quote = (",", '"') if path.suffix == ".csv" else ("\t", "")
        lines = [names, *([f"{quote}{row[name]}{quote}" for name in names] for row in rows)]
        path.write_text("".join(separator.join(line) + "\n" for line in lines), encoding="utf-8")
    return path


def everything(data):
    parts = (data.train, data.validation, data.test)
    return sorted((text, label) for part in parts for text, label in zip(part.texts, part.labels, strict=True))


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_korean_survives_in_every_format(tmp_path, ending):
    path = write(tmp_path / f"data{ending}", KOREAN)
    data = load_data(str(path))
    assert everything(data) == sorted((row["text"], row["label"]) for row in KOREAN)
    assert data.labels == ("0", "1")
    assert data.revision == f"sha256:{sha256(path)}"
    assert (data.text, data.label) == (("text",), "label")


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path, ending):
    path = write(tmp_path / f"data{ending}", KOREAN)
    path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert len(everything(load_data(str(path)))) == 40


def test_the_format_does_not_change_what_is_read(tmp_path):
    every = [load_data(str(write(tmp_path / f"data{end}", KOREAN))) for end in (".csv", ".jsonl", ".parquet")]
    assert every[0].train == every[1].train == every[2].train
    assert every[0].test == every[1].test == every[2].test


def test_a_changed_file_is_read_anew(tmp_path):
    path = write(tmp_path / "data.csv", KOREAN)
    before = load_data(str(path))
    write(path, [{**row, "label": 1 - row["label"]} for row in KOREAN])
    after = load_data(str(path))
    assert before.revision != after.revision
    assert everything(before) != everything(after)


def test_a_file_name_may_hold_what_a_pattern_would_read_otherwise(tmp_path):
    assert len(everything(load_data(str(write(tmp_path / "후기 [1] **.csv", KOREAN))))) == 40


def test_words_that_pandas_takes_for_nothing_stay_texts_and_labels(tmp_path):
    nothings = ["NA", "null", "None", "nan"]
    texts = [*nothings, *(f"film {i}" for i in range(36))]
    rows = [{"text": text, "label": ["N/A", "007"][i % 2]} for i, text in enumerate(texts)]
    data = load_data(str(write(tmp_path / "data.csv", rows)))
    assert data.labels == ("007", "N/A")
    assert set(nothings) <= {text for text, _ in everything(data)}


def test_a_quotation_mark_in_tsv_is_a_letter(tmp_path):
    rows = [{"text": '"so so' if i == 3 else f"film {i}", "label": i % 2} for i in range(40)]
    assert ('"so so', 1) in everything(load_data(str(write(tmp_path / "data.tsv", rows))))


def test_a_label_column_may_change_its_look_far_down(tmp_path):
    rows = [{"text": f"film {i}", "label": 0 if i < 15_000 else "none"} for i in range(15_100)]
    assert load_data(str(write(tmp_path / "data.csv", rows))).labels == ("0", "none")


@pytest.mark.parametrize("name", ["validation", "valid", "dev", "val"])
def test_a_folder_gives_each_split_a_file(tmp_path, name):
    write(tmp_path / "train.csv", KOREAN)
    write(tmp_path / f"{name}.jsonl", [{"text": f"valid {i}", "label": i % 2} for i in range(6)])
    write(tmp_path / "test.tsv", [{"text": f"test {i}", "label": i % 2} for i in range(4)])
    (tmp_path / "README.md").write_text("about")
    data = load_data(str(tmp_path))
    assert (len(data.train), len(data.validation), len(data.test)) == (40, 6, 4)
    assert data.validation.texts[0] == "valid 0"
    assert data.splitting == "train, validation and test as given"
    assert data.revision.startswith("sha256:")


def test_a_folder_with_a_single_file_is_divided(tmp_path):
    write(tmp_path / "reviews.csv", KOREAN)
    data = load_data(str(tmp_path))
    assert (len(data.train), len(data.validation), len(data.test)) == (32, 4, 4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", b"", "empty.csv is empty"),
        ("empty.jsonl", b"", "empty.jsonl is empty"),
        ("empty.json", b"[]", "empty.json holds no rows"),
        ("header.csv", b"text,label\n", "header.csv holds no rows"),
        ("korean.csv", "text,label\n좋다,1\n".encode("cp949"), "korean.csv is not in UTF-8"),
        ("twice.csv", b"text,text,label\na,b,1\n", "two columns are named 'text'"),
        ("comma.csv", b"text,label\nWell, no,1\nYes,0\n", "comma.csv could not be read: a row has more cells"),
        ("later.csv", b"text,label\nYes,0\nWell, no,1\n", "later.csv could not be read: .*line 3"),
        ("broken.jsonl", b'{"text": "a", "label": 1}\n{"text": \n', "broken.jsonl could not be read: JSON parse error"),
        ("broken.parquet", b"PAR1", "broken.parquet could not be read"),
        ("notes.txt", b"text", "notes.txt is of no kind that is read here"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, capfd, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_data(str(tmp_path / name))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "has no training file; found: nothing"),
        (("a.csv", "b.csv"), "has no training file; found: a.csv, b.csv"),
        (("train.csv", "train.tsv"), "more than one file named train"),
    ],
)
def test_a_folder_without_one_training_file_is_refused(tmp_path, files, message):
    for name in files:
        write(tmp_path / name, KOREAN)
    with pytest.raises(UserError, match=message):
        load_data(str(tmp_path))


def test_a_path_where_nothing_is_brings_the_nearest_files(tmp_path):
    write(tmp_path / "reviews.csv", KOREAN)
    with pytest.raises(UserError, match=r"no file or folder named '.*reviws\.csv'") as error:
        load_data(str(tmp_path / "reviws.csv"))
    assert str(tmp_path / "reviews.csv") in error.value.hint


def test_an_unknown_name_brings_the_nearest_names():
    with pytest.raises(UserError, match="no data set named 'rotten-tomatos'") as error:
        load_data("rotten-tomatos")
    assert "did you mean rotten-tomatoes" in error.value.hint
    with pytest.raises(UserError, match="no data set named 'imdb'") as error:
        load_data("imdb")
    assert "owner/name on the hub" in error.value.hint
