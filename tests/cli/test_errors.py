"""What a user can mend is one message with a hint, before anything is trained or written."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from command import assert_refused, deltatune, reviews, write_reviews, write_table
from deltatune.comparing import compare
from tiny import save_tiny

UNFIT_FLAGS = {
    "an unknown method": ("--method lroa", "no method named 'lroa'", "lora"),
    "an unknown option": ("--method lora:rnak=8", "no lora option named 'rnak'", "rank"),
    "an option without a value": ("--method lora:rank", "'rank' is not an option", "rank=8"),
    "a rank above every layer": ("--method lora:rank=64", "rank 64", "32"),
    "a target that matches nothing": ("--method lora:targets=qurey", "'qurey' matches no layer", "query"),
    "targets that are no list": ("--method lora:targets=query,value", "matches no layer", "[query,value]"),
    "one method twice": ("--method lora --method lora", "two methods are called 'lora'", "label"),
    "a negative number": ("--epochs -1", "training.epochs should be greater than 0", "Passes"),
    "a number that is none": ("--epochs many", "'--epochs'", "deltatune compare --help"),
    "a setting that is none of its words": ("--training schedule=liner", "'linear', 'cosine' or 'constant'", "rate"),
    "an unknown setting": ("--training bach_tokens=64", "'training.bach_tokens'", "batch_tokens"),
    "a rate that is infinite": ("--method lora:learning_rate=inf", "finite", "rate"),
    "no examples": ("--train 0", "data.train", "training examples"),
    "fewer examples than labels": ("--train 1", "limit of 1", "at least 2"),
    "a negative seed": ("--seed -1", "seeds.0", "seed"),
    "an unknown flag": ("--metod lora", "--metod (Possible options: --method", "--help"),
    "an unknown base": ("--base minilmm", "no base named 'minilmm'", "minilm"),
    "a folder that is not there": ("--base ./nowhere", "no base named './nowhere'", "config.json"),
    "a base on a hub out of reach": ("--base someone/model", "could not reach the hub", "local folder"),
    "unknown data": ("--data rotten-tomatos", "no data set named 'rotten-tomatos'", "rotten-tomatoes"),
    "a file that is not there": ("--data revews.csv", "'revews.csv'", ""),
    "a column that is not there": ("--text txt", "no column 'txt'", "text"),
    "texts for labels": ("--label text", "no classes", "--label"),
    "no experiment file": ("nowhere.yaml", "could not read nowhere.yaml", "YAML"),
}


@pytest.fixture
def refused(base, data, tmp_path, monkeypatch):
    """Compares with these words and looks whether that was refused before any cell ran and any file was written."""
    monkeypatch.setattr(compare.CellProcesses, "run", lambda processes, cell: pytest.fail("a cell ran"))

    def look(*words, error="", hint=""):
        done = deltatune("compare", "--base", base, "--data", data, *words, "--out", tmp_path / "run")
        assert_refused(done, error, hint)
        assert not (tmp_path / "run").exists()

    return look


@pytest.mark.parametrize(("words", "error", "hint"), UNFIT_FLAGS.values(), ids=UNFIT_FLAGS)
def test_unfit_flags_are_refused_before_any_cell_runs(refused, words, error, hint):
    refused(*words.split(), error=error, hint=hint)


def test_an_unknown_command_is_answered_with_the_nearest():
    assert_refused(deltatune("comapre"), "'comapre'. Did you mean 'compare'?", "deltatune --help")


def without(name):
    return lambda folder: (folder / name).unlink()


def unsafe(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def configured(**values):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


UNFIT_BASES = {
    "no config.json": (without("config.json"), "it has no config.json", "save_pretrained"),
    "weights in pickle alone": (unsafe, "no weights in safetensors (found: pytorch_model.bin)", "can run code"),
    "an architecture without a classifier": (configured(model_type="clip"), "it is a model of type clip", "BERT"),
}


@pytest.mark.parametrize(("spoil", "error", "hint"), UNFIT_BASES.values(), ids=UNFIT_BASES)
def test_an_unfit_base_is_refused_before_any_cell_runs(refused, base, tmp_path, spoil, error, hint):
    spoil(shutil.copytree(base, tmp_path / "base"))
    refused("--base", tmp_path / "base", error=error, hint=hint)


@pytest.mark.parametrize(("storage", "said"), [("", "is damaged: {} has"), ("nf4", "{}: it has")])
def test_weights_that_are_not_finite_are_refused_by_name(base, data, tmp_path, storage, said):
    file = shutil.copytree(base, tmp_path / "base") / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("query.weight"))
    weights[name][0, 0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    words = ("--base", tmp_path / "base", "--data", data, "--storage", storage, "--out", tmp_path / "out")
    done = deltatune("tune", *words)
    assert done.err.startswith("error: ")
    assert f"{said.format(name)} values that are not finite" in done.err
    assert done.code == 1


UNFIT_STORAGES = {
    "a format that is none": ("nf5", "no storage named 'nf5'", "nf4"),
    "a block of 0": ("nf4:block=0", "block must be a power of two from 16 to 4096, not 0", "64 is usual"),
    "an unknown option": ("nf4:blck=64", "no nf4 option named 'blck'", "block"),
    "an unknown target": ("{qurey: nf4}", "target 'qurey' matches no layer", "query"),
    "half a mapping": ("{mlp: nf4", "is no mapping", "{mlp: nf4, attention: int8}"),
}


@pytest.mark.parametrize(("storage", "error", "hint"), UNFIT_STORAGES.values(), ids=UNFIT_STORAGES)
def test_a_storage_that_cannot_be_is_refused(base, data, tmp_path, storage, error, hint):
    done = deltatune("tune", "--base", base, "--data", data, "--storage", storage, "--out", tmp_path / "out")
    assert_refused(done, error, hint)


@pytest.mark.parametrize("storage", ["", "nf4"])
def test_a_base_that_another_library_quantised_is_refused(base, data, tmp_path, storage):
    folder = shutil.copytree(base, tmp_path / "base")
    configured(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})(folder)
    words = ("--base", folder, "--data", data, "--storage", storage, "--out", tmp_path / "out")
    assert_refused(deltatune("tune", *words), "is quantised already, by bitsandbytes", "unquantised form")


def test_code_that_comes_with_a_base_is_never_run(base, data, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    configured(auto_map={"AutoModelForSequenceClassification": "evil.Evil", "AutoConfig": "evil.Config"})(folder)
    done = deltatune("tune", "--base", folder, "--data", data, "--method", "head", "--out", tmp_path / "out")
    assert done.code == 0
    assert not (tmp_path / "ran").exists()


HEADER = ("text", "label")
UNFIT_DATA = {
    "one class alone": (
        [HEADER, *((text, "same") for text, _ in reviews(20))],
        "all 20 rows have the label 'same'",
        "two",
    ),
    "numbers for texts": ([HEADER, *((n, n % 2) for n in range(20))], "holds numbers, not text", "--text"),
    "too few rows to divide": ([HEADER, *reviews(2)], "too few", "more rows"),
}


@pytest.mark.parametrize(("rows", "error", "hint"), UNFIT_DATA.values(), ids=UNFIT_DATA)
def test_unfit_data_are_refused_before_any_cell_runs(refused, tmp_path, rows, error, hint):
    refused("--data", write_table(tmp_path / "unfit.csv", rows), error=error, hint=hint)


def test_labels_that_training_does_not_have_are_refused(refused, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_reviews(folder / "train.csv")
    write_table(folder / "test.csv", [HEADER, ("a film", "중립"), ("the film", "긍정")])
    refused("--data", folder, error="'중립' (first in row 1)", hint="긍정, 부정")


def damaged(folder):
    file = folder / "adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def cut_off(folder):
    file = folder / "adapter" / "deltatune.json"
    file.write_text(file.read_text()[:50])


UNFIT_ADAPTERS = {
    "not there": (shutil.rmtree, "holds no adapter", "tune --out"),
    "a flipped bit": (damaged, "adapter_model.safetensors is damaged", "train it again"),
    "a record that was cut off": (cut_off, "deltatune.json is not valid JSON", "damaged"),
}


@pytest.mark.parametrize("command", ["evaluate", "predict"])
@pytest.mark.parametrize(("spoil", "error", "hint"), UNFIT_ADAPTERS.values(), ids=UNFIT_ADAPTERS)
def test_an_unfit_adapter_is_refused(tuned, tmp_path, spoil, error, hint, command):
    folder = shutil.copytree(tuned.folder, tmp_path / "adapter")
    spoil(folder)
    assert_refused(deltatune(command, folder, stdin="a film"), error, hint)


def test_an_adapter_refuses_another_base_and_asks_for_one_that_is_gone(tuned, tmp_path):
    other = save_tiny(tmp_path / "other", "roberta")
    assert_refused(deltatune("predict", tuned.folder, "--base", other, stdin="a film"))
    record = shutil.copytree(tuned.folder, tmp_path / "adapter") / "adapter" / "deltatune.json"
    about = json.loads(record.read_text())
    about["base"]["id"] = str(tmp_path / "gone")
    record.write_text(json.dumps(about))
    assert_refused(deltatune("predict", tmp_path / "adapter", stdin="a film"), f"'{tmp_path}/gone'", "--base")


def test_evaluate_refuses_splits_and_labels_that_the_adapter_does_not_know(tuned, tmp_path):
    assert_refused(deltatune("evaluate", tuned.folder, "--split", "tst"), "no split 'tst'", "test")
    other = write_table(tmp_path / "other.csv", [HEADER, *((text, text.split()[0]) for text, _ in reviews())])
    assert_refused(deltatune("evaluate", tuned.folder, "--data", other), "was not trained on", "긍정, 부정")


def test_evaluate_does_not_score_changed_data_as_if_it_were_the_same(base, tmp_path):
    data = write_reviews(tmp_path / "reviews.csv")
    deltatune("tune", "--base", base, "--data", data, "--method", "head", "--epochs", 1, "--out", tmp_path / "out")
    write_reviews(data, count=60)
    assert_refused(deltatune("evaluate", tmp_path / "out"), "changed since this adapter was trained", "--data")
    assert deltatune("evaluate", tmp_path / "out", "--data", data).code == 0


UNFIT_TEXTS = {
    "nothing": (b"", "stdin has no text", "one text a line"),
    "empty lines alone": (b"\n \n", "stdin has no text", "one text a line"),
    "another encoding": ("영화".encode("cp949"), "stdin is not in UTF-8", "UTF-8"),
    "broken JSON": (b'a film\n{"text": ', "line 2 of stdin is not valid JSON", '"text"'),
    "JSON without a text": (b'{"txt": "a film"}', 'line 1 of stdin has no "text"', '"text"'),
    "pairs and single texts": (b'{"text": "a", "pair": "b"}\na film', "some lines have a pair", "every line"),
    "pairs for single texts": (b'{"text": "a", "pair": "b"}', "trained on single texts", "one text"),
}


@pytest.mark.parametrize(("texts", "error", "hint"), UNFIT_TEXTS.values(), ids=UNFIT_TEXTS)
def test_predict_refuses_what_it_cannot_label(tuned, texts, error, hint):
    assert_refused(deltatune("predict", tuned.folder, stdin=texts), error, hint)


def test_predict_names_a_file_that_it_cannot_read(tuned, tmp_path):
    for name in ("nowhere.txt", "."):
        assert_refused(deltatune("predict", tuned.folder, "--input", tmp_path / name), "could not read", "stdin")


def test_training_that_diverges_says_where_and_saves_nothing(base, data, tmp_path):
    words = ("--method", "full", "--learning-rate", 1e30, "--training", "batch_tokens=64", "--out", tmp_path / "out")
    done = deltatune("tune", "--base", base, "--data", data, *words)
    assert_refused(done, "training stopped at step 2: the loss is nan", "lower the learning rate")
    assert not (tmp_path / "out" / "adapter").exists()
    assert not (tmp_path / "out" / "result.json").exists()


def test_a_fault_of_ours_is_named_as_such_without_a_traceback(monkeypatch):
    monkeypatch.setattr("deltatune.methods.describe.describe_all", lambda: 1 / 0)
    done = deltatune("methods")
    assert done.code == 70
    assert done.err.startswith("error: unexpected ZeroDivisionError: division by zero\nhint: this is a fault of ours")
