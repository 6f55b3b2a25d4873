"""`deltatune chat`: a conversation through a pipe or a terminal, with a bare base or an adapter."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

import pytest
import torch

import deltatune as library
from command import assert_refused, deltatune
from deltatune import LoRA
from deltatune.cli.main import main
from deltatune.training.chat import Chat
from deltatune.training.generation import Decoding
from tiny import save_tiny_language_model

FEW = ("--decoding", "max_new_tokens=5", "--precision", "fp32")


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    return save_tiny_language_model(tmp_path_factory.mktemp("writer"), "gpt2", chat=True, tied=False)


@pytest.fixture(scope="module")
def adapter(writer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    base = library.load(str(writer))
    library.attach(base.model, LoRA(rank=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, base.model.parameters()):
            parameter.normal_(generator=generator)
    library.save_adapter(base.model, folder, base=str(writer), revision=base.revision, labels=[])
    return folder


def answers(*words, said):
    """What is answered to the lines piped in, line by line."""
    done = deltatune("chat", *words, *FEW, stdin=said)
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith("\n")
    return done.out.removesuffix("\n").split("\n")


def test_each_piped_line_is_answered_in_the_light_of_those_before(writer):
    first, second = answers("--base", writer, said="a good film\n\nwas it dull\n")
    assert first.strip()
    assert answers("--base", writer, said="a good film\n/reset\nwas it dull") == [
        first,
        *answers("--base", writer, said="was it dull\n"),
    ]
    talk = Chat(library.load(str(writer)), "fp32", Decoding(max_new_tokens=5))
    assert [talk.reply(line, lambda _: None) for line in ("a good film", "was it dull")] == [first, second]
    assert [turn.role for turn in talk.turns] == ["user", "assistant"] * 2


def test_the_system_speaks_first(writer):
    assert answers("--base", writer, "--system", "very very cold", said="a film") != answers(
        "--base", writer, said="a film"
    )


def test_an_adapter_talks_and_not_its_base(writer, adapter):
    said = "a good film\nwas it dull\n"
    assert answers(adapter, said=said) != answers("--base", writer, said=said)
    assert answers(adapter, said=said) == answers(adapter, "--base", writer, said=said)


def test_a_long_conversation_forgets_its_oldest_turns_but_not_the_system(writer):
    talk = Chat(library.load(str(writer)), "fp32", Decoding(max_new_tokens=5), system="warm plot")
    prompts = []
    talk.base.model.register_forward_pre_hook(
        lambda _, args, kwargs: prompts.append(kwargs["input_ids"]), with_kwargs=True
    )
    for word in ("a", "the", "film", "story", "is", "was", "and", "not"):
        talk.reply(f"{word} {word} good", lambda _: None)
    begun = [talk.base.tokenizer.decode(ids[0]) for ids in prompts if ids.shape[1] > 1]
    assert len(begun) == 8
    assert max(ids.shape[1] for ids in prompts) <= 64 - 5
    assert all("warm plot" in text for text in begun)
    assert "a a good" in begun[1]
    assert "a a good" not in begun[-1]
    assert "and and good" in begun[-1]


def test_what_is_drawn_is_new_in_every_turn_and_the_same_in_every_run(writer):
    drawn = ("--base", writer, "--decoding", "temperature=3", "--decoding", "seed=4")
    said = "a film\n/reset\na film\n"
    assert answers(*drawn, said=said) == answers(*drawn, said=said)
    one, two = answers(*drawn, said="a film\n")[0], answers(*drawn[:-1], "seed=5", said="a film\n")[0]
    assert one != two


class Terminal(io.StringIO):
    """Somebody who types these lines and then ends it."""

    def __init__(self, lines, end):
        super().__init__(lines)
        self.end = end

    def isatty(self):
        return True

    def readline(self, *size):
        line = super().readline(*size)
        if not line and self.end == "Ctrl-C":
            raise KeyboardInterrupt
        return line


@pytest.mark.parametrize("end", ["Ctrl-D", "Ctrl-C"])
def test_a_conversation_in_a_terminal_ends_kindly(writer, end):
    typed = Terminal("a good film\n/reset\nwas it dull\n", end)
    words = ["deltatune", "chat", "--base", str(writer), *FEW]
    out, err = io.StringIO(), io.StringIO()
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        patch.multiple(sys, argv=words, stdin=typed),
        pytest.raises(SystemExit) as done,
    ):
        main()
    assert not done.value.code
    assert err.getvalue() == "/reset begins anew, Ctrl-D ends\n"
    piped = answers("--base", writer, said="a good film\n/reset\nwas it dull\n")
    assert out.getvalue() == f"> {piped[0]}\n> > {piped[1]}\n> \n"


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        ((), "nothing to talk with", "--base"),
        (("--base", "{writer}", "--decoding", "beam=2"), "no setting of writing named 'beam'", "beams"),
        (("--base", "{writer}", "--decoding", "beams=0"), "beams should be greater than or equal to 1", "side by side"),
        (("--base", "{writer}", "--decoding", "top_k=3"), "nothing is drawn", "temperature"),
        (("--base", "{writer}", "--decoding", "beams=2"), "beams cannot be shown", "leave out the beams"),
        (("{adapter}", "--storage", "nf4"), "stored as it was trained", "leave out"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(words, error, hint, writer, adapter):
    given = [word.format(writer=writer, adapter=adapter) for word in words]
    assert_refused(deltatune("chat", *given, stdin="a film\n"), error, hint)


def test_an_adapter_that_labels_texts_is_refused(tuned):
    assert_refused(deltatune("chat", tuned.folder / "adapter", stdin="a film\n"), "cannot talk", "deltatune predict")
