"""`deltatune predict` with an adapter that writes: prompts are made as in its training, whatever form a line has."""

import json

import pytest
import torch

import deltatune as library
from command import assert_refused, deltatune, write_table
from deltatune import LoRA
from deltatune.data.encode import prompts
from deltatune.training.asking import asking
from deltatune.training.generation import Decoding, generate
from tiny import save_tiny_language_model

FEW = ("--decoding", "max_new_tokens=5", "--precision", "fp32")
QUESTIONS = ("a good film", "was it dull", "the grey plot of this story", "bright and clever")


@pytest.fixture(scope="module", params=["gpt2", "t5"])
def writer(request, tmp_path_factory):
    chat = request.param == "gpt2"
    return save_tiny_language_model(tmp_path_factory.mktemp("writer"), request.param, chat=chat, tied=False)


def line_of(place):
    return f"{QUESTIONS[place % 4]} {'very ' * (place // 4)}"


def data_of(folder, form):
    """Questions with answers, as prompts with completions, with words around them, or as a chat with a system."""
    rows = [(line_of(place), f"it was {QUESTIONS[place % 4].split()[-1]}") for place in range(16)]
    table = write_table(folder / "data.csv", [("prompt", "completion"), *rows])
    options = {"template": {"template": "the cast of {prompt} is"}, "system": {"system": "very cold"}}
    return library.load_data(str(table), **options.get(form, {}))


def save(writer, folder, **about):
    base = library.load(str(writer))
    library.attach(base.model, LoRA(rank=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, base.model.parameters()):
            parameter.normal_(generator=generator)
    library.save_adapter(
        base.model, folder, base=str(writer), revision=base.revision, labels=[], max_length=40, **about
    )
    return base


def predicted(folder, lines, *words):
    done = deltatune("predict", folder, *FEW, *words, stdin="\n".join(lines))
    assert (done.code, done.err) == (0, "")
    return [json.loads(line) for line in done.out.splitlines()]


@pytest.mark.parametrize("form", ["prompts", "template", "system"])
def test_a_line_becomes_the_prompt_that_it_was_in_training(writer, form, tmp_path):
    data = data_of(tmp_path, form)
    base = save(writer, tmp_path / "adapter", asking=asking(data))
    both = base.model.config.is_encoder_decoder
    trained = prompts(data.train, base.tokenizer, limit=64, encoder_decoder=both)
    expected = [text.strip() for text in generate(base.model, base.tokenizer, trained, Decoding(max_new_tokens=5))]
    assert len(set(expected)) > 1
    lines = [line_of(example.row - 1).strip() for example in data.train.examples]
    said = predicted(tmp_path / "adapter", lines)
    name = "prompt" if form == "template" else "text"
    assert said == [{name: line, "prediction": text} for line, text in zip(lines, expected, strict=True)]
    told = [json.dumps({name: line, "id": 7}) for line in lines]
    assert predicted(tmp_path / "adapter", told) == [{**row, "id": 7} for row in said]


def test_what_tune_saved_answers_as_on_its_test_rows(tmp_path):
    base = save_tiny_language_model(tmp_path / "base", "gpt2", tied=False)
    data_of(tmp_path, "prompts")
    settings = ("--epochs", 1, "--training", "batch_tokens=128", "--training", "evaluations=1", *FEW)
    tuned = deltatune("tune", "--base", base, "--data", tmp_path / "data.csv", *settings, "--out", tmp_path / "run")
    assert tuned.code == 0, tuned.err
    tested = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert tested
    lines = [json.dumps({"text": row["prompt"]}) for row in tested]
    done = deltatune("predict", tmp_path / "run" / "adapter", stdin="\n".join(lines))
    assert done.code == 0, done.err
    assert [json.loads(line)["prediction"] for line in done.out.splitlines()] == [
        row["prediction"].strip() for row in tested
    ]


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """An adapter that does not say how it was asked, on a base with a chat template."""
    base = save_tiny_language_model(tmp_path_factory.mktemp("talker"), "gpt2", chat=True, tied=False)
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    save(base, folder, decoding={"max_new_tokens": 3})
    return folder


def test_without_a_record_a_line_is_a_users_turn_where_there_is_a_chat_template(talker):
    messages = [{"role": "user", "content": "a good film"}]
    [line, chat] = predicted(talker, ["a good film", json.dumps({"messages": messages})])
    assert line["prediction"] == chat["prediction"] != ""
    assert chat["messages"] == messages
    [longer] = predicted(
        talker, [json.dumps({"messages": [*messages, {"role": "assistant", "content": "dull"}, *messages]})]
    )
    assert longer["prediction"] != chat["prediction"]


def test_it_writes_as_its_record_says_and_as_it_is_told(talker):
    def written(*given):
        done = deltatune("predict", talker, "--precision", "fp32", *given, stdin="a good film\n")
        return json.loads(done.out)["prediction"]

    told = written("--decoding", "max_new_tokens=8")
    assert told.startswith(written())
    assert len(told) > len(written())


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ('{"text": 3}', 'line 1 of stdin has no "text" that is a text'),
        ('{"words": "a film"}', 'has no "text"'),
        ('{"text": "a film"', "not valid JSON"),
        ('{"messages": []}', "has no messages"),
        ('{"messages": [{"role": "user"}]}', "not a role and a text"),
        ('{"messages": [{"role": "critic", "content": "a film"}]}', "no role named 'critic'"),
    ],
)
def test_a_line_that_cannot_be_read_is_refused(line, error, talker):
    assert_refused(deltatune("predict", talker, stdin=line), error)


def test_an_adapter_that_labels_texts_takes_no_settings_of_writing(tuned):
    done = deltatune("predict", tuned.folder / "adapter", "--decoding", "beams=2", stdin="a film\n")
    assert_refused(done, "labels texts", "--decoding")
