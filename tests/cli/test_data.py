"""`deltatune data show`: what stands in data, and what of it a base would learn."""

import json
from io import StringIO

import pytest
from rich.console import Console

from chats import CHATML, bytes_tokenizer
from command import assert_refused, deltatune
from deltatune.cli import options
from tiny import save_tiny_language_model


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    asked = ("Hi?", "So?", "a\x1b[2Jb")
    rows = [
        {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": "Ja."}]}
        for said in (*asked, *(f"Nr {i}?" for i in range(5)))
    ]
    for name in ("train", "validation", "test"):
        (path.parent / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.parent


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = save_tiny_language_model(tmp_path_factory.mktemp("base"), "gpt2")
    bytes_tokenizer(CHATML, eos="<|im_end|>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder_decoder(tmp_path_factory):
    folder = save_tiny_language_model(tmp_path_factory.mktemp("t5"), "t5")
    bytes_tokenizer(frame="$A </s>").save_pretrained(folder)
    return folder


def test_a_base_shows_its_tokens_with_what_is_scored_between_marks(chats, base):
    done = deltatune("data", "show", chats, "--base", base, "--count", 2)
    assert done.code == 0, done.err
    assert "generation, from messages" in done.out
    assert "8 train, 8 validation, 8 test; train, validation and test as given" in done.out
    assert "train 2, row 2, 4 of 26 tokens scored\n" in done.out
    assert "<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n⟦Ja.<|im_end|>⟧\n" in done.out
    assert "all 8 train examples have 27.6 tokens on average, 4.0 of them scored, and 29 at most; 0 were" in done.out


def test_json_has_the_same(chats, base):
    done = deltatune("data", "show", chats, "--base", base, "--split", "test", "--max-length", 28, "--json")
    about = json.loads(done.out)
    assert about["shown"][0] == {
        "row": 1,
        "tokens": 26,
        "scored": 4,
        "parts": [
            {"text": "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n", "scored": False},
            {"text": "Ja.<|im_end|>", "scored": True},
        ],
    }
    assert (about["task"], about["split"], about["examples"]["test"]) == ("generation", "test", 8)
    assert (about["tokens"]["truncated"], about["tokens"]["longest"]) == (1, 28)


def test_without_a_base_there_are_turns_and_nothing_in_them_steers_the_terminal(chats):
    done = deltatune("data", "show", chats)
    assert "user: Hi?\nassistant: ⟦Ja.⟧\n" in done.out
    assert "user: a␛[2Jb\n" in done.out


def test_on_a_terminal_colours_stand_for_the_marks(chats, monkeypatch):
    written = StringIO()
    monkeypatch.setattr(
        options, "table_console", lambda: Console(file=written, force_terminal=True, color_system="standard", width=80)
    )
    monkeypatch.delenv("NO_COLOR", raising=False)
    deltatune("data", "show", chats, "--count", 1)
    assert "\x1b[2mHi?\x1b[0m" in written.getvalue()
    assert "\x1b[32mJa.\x1b[0m" in written.getvalue()
    assert "⟦" not in written.getvalue()


def test_an_encoder_decoder_reads_the_prompt_and_learns_the_answer(tmp_path, encoder_decoder):
    rows = [{"article": f"abc {i}", "title": f"ab {i}", "summary": f"a {i}"} for i in range(10)]
    (tmp_path / "articles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--template", "Sum up: {article} ({title})", "--label", "summary", "--count", 1)
    done = deltatune("data", "show", tmp_path / "articles.jsonl", "--base", encoder_decoder, *words)
    assert "generation, from article, title and summary" in done.out
    assert "\nSum up: abc 0 (ab 0)</s>⟦a 0</s>⟧\n" in done.out


def test_labelled_texts_are_shown_with_their_labels(data):
    done = deltatune("data", "show", data, "--count", 1)
    assert "classification, from text and label" in done.out
    assert "train 1, label 부정\na film is bad 0\n" in done.out
    shown = json.loads(deltatune("data", "show", data, "--count", 1, "--json").out)
    assert shown["shown"] == [{"text": "a film is bad 0", "label": "부정"}]


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        ("--split tset", "no split named 'tset'", "test"),
        ("--task regression", "no task named 'regression'", "generation"),
        ("--base nowhere", "no base named 'nowhere'", "minilm"),
        ("--base minilm", "'minilm' cannot write text", "decoder"),
        ("--max-length 19 --base {base}", "row 1 ('Hi? Ja.') has no token to learn", "max"),
        ("--template {{nothing}} --label messages", "no column 'nothing'", "messages"),
    ],
)
def test_what_cannot_be_shown_is_refused(chats, base, words, error, hint):
    assert_refused(deltatune("data", "show", chats, *words.format(base=base).split()), error, hint)


def test_a_base_has_no_say_in_labelled_texts(data, base):
    assert_refused(deltatune("data", "show", data, "--base", base), "is for classification", "--base")
