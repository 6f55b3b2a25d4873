"""Training one method, and using what it saved: `tune`, `evaluate`, `predict`, `methods`."""

import json

import pytest

from command import assert_refused, deltatune, write_table
from deltatune import attach, load, make
from deltatune.comparing.cell import run_cell
from deltatune.comparing.experiment import make_experiment
from deltatune.models.attach import trainable_parameters

TEXTS = "a good film\n정말 지루하다\nthe cast is not great\n"
OPINIONS = ("bad", "good")
LABELS = {"부정", "긍정"}


def json_lines(text):
    return [json.loads(line) for line in text.split("\n") if line]


def test_tune_prints_its_record_on_stdout_and_talks_on_stderr(tuned):
    record = json.loads(tuned.command.out)
    assert (record["label"], record["status"], record["options"]["rank"]) == ("lora (rank=4)", "done", 4)
    assert "accuracy" in tuned.command.err
    assert f"adapter: {tuned.folder}/adapter" in tuned.command.err
    assert tuned.command.code == 0


def test_without_json_tune_leaves_stdout_empty(base, data, tmp_path):
    done = deltatune(
        "tune", "--base", base, "--data", data, "--method", "head", "--epochs", 1, "--out", tmp_path / "out"
    )
    assert (done.code, done.out) == (0, "")


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tuned, base, data, tmp_path):
    settings = ("--set", "rank=4", "--epochs", 2, "--training", "batch_tokens=128", "--training", "evaluations=1")
    for seed in (0, 1):
        deltatune("tune", "--base", base, "--data", data, *settings, "--seed", seed, "--out", tmp_path / str(seed))
    first, same, other = (
        (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        for folder in (tuned.folder, tmp_path / "0", tmp_path / "1")
    )
    assert first == same
    assert first != other


def test_evaluate_repeats_the_scores_of_the_run(tuned):
    scores = json.loads(deltatune("evaluate", tuned.folder, "--json").out)
    result = json.loads((tuned.folder / "result.json").read_text())
    assert scores == {
        "split": "test",
        "examples": len(result["test_values"]),
        "accuracy": result["test"]["accuracy"],
        "macro_f1": result["test"]["macro_f1"],
        "calibration_error": result["test"]["calibration_error"],
        "loss": result["test"]["loss"],
    }


def test_evaluate_scores_the_rows_that_the_run_was_limited_to(base, data, tmp_path):
    experiment = tmp_path / "limited.yaml"

    content = {
        "base": str(base),
        "data": {"name": str(data), "test": 4},
        "methods": ["head"],
        "training": {"epochs": 1},
    }
    [cell] = make_experiment(content, str(experiment)).cells()
    result = run_cell(cell, tmp_path / "run")
    scores = json.loads(deltatune("evaluate", tmp_path / "run", "--json").out)
    assert scores["examples"] == 4
    assert scores["loss"] == result.test["loss"]


def test_evaluate_finds_labels_by_name_in_data_that_orders_them_otherwise(tuned, data, tmp_path):
    rows = [tuple(line.rsplit(",", 1)) for line in data.read_text().splitlines()[1:]]
    turned = write_table(tmp_path / "turned.csv", [("label", "text"), *((label, text) for text, label in rows)])
    alone = deltatune("evaluate", tuned.folder, "--data", turned, "--split", "all", "--json")
    every = deltatune("evaluate", tuned.folder, "--split", "all", "--json")
    assert json.loads(alone.out)["examples"] == len(rows)
    assert json.loads(alone.out)["accuracy"] == json.loads(every.out)["accuracy"]


def test_evaluate_prints_a_table_without_json(tuned):
    header, figures = deltatune("evaluate", tuned.folder).out.splitlines()
    assert header.split() == ["split", "examples", "accuracy", "macro_f1", "calibration_error", "loss"]
    assert figures.split()[:2] == ["test", "8"]


@pytest.mark.parametrize("form", ["plain", "JSON"])
@pytest.mark.parametrize("source", ["stdin", "file"])
def test_predict_labels_every_text_in_order(tuned, tmp_path, source, form):
    texts = TEXTS.splitlines()
    lines = texts if form == "plain" else [json.dumps({"text": text}) for text in texts]
    content = "\n".join(lines)
    (tmp_path / "texts").write_text(content, encoding="utf-8")
    given = ("--input", tmp_path / "texts") if source == "file" else ()
    done = deltatune("predict", tuned.folder, *given, stdin="" if given else content)
    answers = json_lines(done.out)
    assert [answer["text"] for answer in answers] == texts
    assert {answer["label"] for answer in answers} <= LABELS
    assert all(0.5 <= answer["probability"] <= 1 for answer in answers)
    assert (done.code, done.err) == (0, "")


def test_a_text_gets_the_same_answer_alone_and_among_others(tuned):
    alone = [json.loads(deltatune("predict", tuned.folder, stdin=text).out) for text in TEXTS.splitlines()]
    among = json_lines(deltatune("predict", tuned.folder, stdin=TEXTS).out)
    assert [answer["label"] for answer in alone] == [answer["label"] for answer in among]
    assert [a["probability"] for a in alone] == pytest.approx([a["probability"] for a in among], abs=2e-4)


def test_only_a_line_feed_ends_a_text(tuned):
    texts = ["a good\u2028film", "a bad\x85film\x0bagain", "정말\r"]
    raw = json_lines(deltatune("predict", tuned.folder, stdin="\n".join(texts)).out)
    assert [answer["text"] for answer in raw] == [text.strip() for text in texts]
    written = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    assert [answer["text"] for answer in json_lines(deltatune("predict", tuned.folder, stdin=written).out)] == texts


def test_pairs_are_trained_on_and_predicted_as_pairs(base, tmp_path):
    rows = [("premise", "hypothesis", "label")]
    rows += [
        (f"the film is {word} {n}", "a good film", label)
        for n in range(20)
        for word, label in (("bad", 0), ("good", 1))
    ]
    data = write_table(tmp_path / "pairs.csv", rows)
    out = tmp_path / "out"
    assert deltatune("tune", "--base", base, "--data", data, "--method", "head", "--epochs", 1, "--out", out).code == 0
    pair = {"text": "the film is good", "pair": "a bad film"}
    [answer] = json_lines(deltatune("predict", out, stdin=json.dumps(pair)).out)
    assert (answer["text"], answer["pair"]) == (pair["text"], pair["pair"])
    assert answer["label"] in ("0", "1")
    assert_refused(deltatune("predict", out, stdin="a good film"), "trained on pairs of texts", "two texts")


def test_an_adapter_is_used_where_its_base_lies_now(tuned, base, tmp_path):
    moved = tmp_path / "moved"
    moved.symlink_to(base)
    here, there = (deltatune("predict", tuned.folder, *more, stdin=TEXTS) for more in ((), ("--base", moved)))
    assert here == there


def test_methods_lists_all_and_the_options_of_one():
    every = json.loads(deltatune("methods", "--json").out)
    assert {"full", "head", "lora"} <= {method["name"] for method in every}
    [lora] = [method for method in every if method["name"] == "lora"]
    assert json.loads(deltatune("methods", "lora", "--json").out) == lora
    shown = deltatune("methods", "lora").out
    assert all(option["name"] in shown and option["help"] for option in lora["options"])
    table = deltatune("methods").out
    assert all(method["name"] in table for method in every)


def test_methods_counts_on_a_base_what_attaching_there_trains(base):
    counted = json.loads(deltatune("methods", "--base", base, "--json").out)
    for method in counted:
        if "does_not_fit" not in method:
            model = attach(load(str(base), labels=("0", "1")).model, make(method["name"]))
            assert method["trainable"] == sum(p.numel() for p in trainable_parameters(model).values())
    assert "trainable" in {method["name"]: method for method in counted}["lora"]


def test_methods_counts_one_method_with_its_options(base):
    counted = json.loads(deltatune("methods", "lora:rank=2,targets=query", "--base", base, "--json").out)
    assert (counted["layers"], counted["trainable"] - counted["head"]) == (2, 2 * 2 * (32 + 32))
    shown = deltatune("methods", "lora:rank=2,targets=query", "--base", base)
    assert f"{counted['trainable']:,}" in shown.out
    assert shown.err == ""
    refused = deltatune("methods", "lora:rank=1000", "--base", base)
    assert_refused(refused, "rank 1000 is more than a 32×32 weight has", "the largest is 32")
