import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from chats import CHATML, LLAMA2, LLAMA3, MISTRAL, ZEPHYR, bytes_tokenizer, chat, completion, masked, split
from deltatune.data import Dialogue, Turn
from deltatune.data.encode import encode, prompts, references
from deltatune.data.sequences import UNSCORED
from deltatune.errors import UserError

ONE = chat(("user", "Hi?"), ("assistant", "Yes."))
TWO = chat(("user", "Hi?"), ("assistant", "Yes."), ("user", "So?"), ("assistant", "No."))
ADVISED = chat(("system", "Be brief."), ("user", "Hi?"), ("assistant", "Yes."))


def encoded(tokenizer, *examples, limit=1000, **options):
    return encode(split(*examples), tokenizer, limit=limit, encoder_decoder=False, **options)


def asked(tokenizer, *examples, limit=1000, **options):
    ids = prompts(split(*examples), tokenizer, limit=limit, encoder_decoder=False, **options)
    return [tokenizer.decode(prompt) for prompt in ids]


TEMPLATES = {
    "chatml": (CHATML, {"eos": "<|im_end|>"}),
    "llama2": (LLAMA2, {"bos": "<s>", "frame": "<s> $A"}),
    "llama3": (LLAMA3, {"bos": "<s>", "eos": "<|eot_id|>", "frame": "<s> $A"}),
    "mistral": (MISTRAL, {"bos": "<s>", "frame": "<s> $A"}),
    "zephyr": (ZEPHYR, {"bos": "<s>", "frame": "<s> $A"}),
    "none": ("", {"bos": "<s>", "frame": "<s> $A"}),
}
FORMS = {
    ("chatml", TWO): (
        "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n⟦Yes.<|im_end|>⟧\n"
        "<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n⟦No.<|im_end|>⟧"
    ),
    ("chatml", ADVISED): (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Yes.<|im_end|>⟧"
    ),
    ("llama2", TWO): "<s>[INST] Hi? [/INST]⟦ Yes. </s>⟧<s>[INST] So? [/INST]⟦ No. </s>⟧",
    ("llama2", ADVISED): "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi? [/INST]⟦ Yes. </s>⟧",
    ("llama3", TWO): (
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Yes.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nSo?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦No.<|eot_id|>⟧"
    ),
    ("mistral", TWO): "<s>[INST] Hi? [/INST]⟦Yes.</s>⟧[INST] So? [/INST]⟦No.</s>⟧",
    ("zephyr", TWO): ("<|user|>\nHi?</s>\n<|assistant|>\n⟦Yes.</s>⟧\n<|user|>\nSo?</s>\n<|assistant|>\n⟦No.</s>⟧"),
    ("zephyr", ADVISED): "<|system|>\nBe brief.</s>\n<|user|>\nHi?</s>\n<|assistant|>\n⟦Yes.</s>⟧",
    ("none", TWO): (
        "<s>### Instruction:\nHi?\n\n### Response:\n⟦Yes.</s>⟧\n\n### Instruction:\nSo?\n\n### Response:\n⟦No.</s>⟧"
    ),
    ("none", ADVISED): "<s>Be brief.\n\n### Instruction:\nHi?\n\n### Response:\n⟦Yes.</s>⟧",
}


@pytest.mark.parametrize(("name", "example"), FORMS, ids=lambda value: value if isinstance(value, str) else "")
def test_what_the_template_adds_for_the_assistant_is_scored_and_nothing_else(name, example):
    template, options = TEMPLATES[name]
    tokenizer = bytes_tokenizer(template, **options)
    assert masked(encoded(tokenizer, example), tokenizer) == FORMS[name, example]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "none"])
@pytest.mark.parametrize("example", [ONE, TWO], ids=["one", "two"])
def test_a_prompt_is_what_transformers_makes_of_the_chat_and_what_training_has_before_the_answer(name, example):
    template, options = TEMPLATES[name]
    tokenizer = bytes_tokenizer(template, **options)
    history = [{"role": turn.role, "content": turn.content} for turn in example.turns]
    (prompt,) = prompts(split(example), tokenizer, limit=1000, encoder_decoder=False)
    assert prompt == tokenizer.apply_chat_template(history[:-1], add_generation_prompt=True)["input_ids"]
    sequences = encoded(tokenizer, example)
    trained = sequences.inputs[0]
    assert trained[: len(prompt)] == prompt
    whole = tokenizer.apply_chat_template(history)["input_ids"]
    assert trained == whole[: len(trained)]
    assert tokenizer.decode(whole[len(trained) :]).strip() == ""


def test_prompt_and_completion_are_joined_as_they_are_and_ended():
    tokenizer = bytes_tokenizer(CHATML)
    sequences = encoded(tokenizer, completion("Q: 1+1\nA:", " 2"))
    assert masked(sequences, tokenizer) == "Q: 1+1\nA:⟦ 2</s>⟧"
    assert asked(tokenizer, completion("Q: 1+1\nA:", " 2")) == ["Q: 1+1\nA:"]
    assert references(split(completion("Q: 1+1\nA:", " 2"))) == ["2"]


def test_of_plain_text_every_token_is_scored_that_stands_after_another():
    text = Dialogue((Turn("text", "Once upon", scored=True),))
    assert masked(encoded(bytes_tokenizer(), text), bytes_tokenizer()) == "O⟦nce upon</s>⟧"
    started = bytes_tokenizer(bos="<s>", frame="<s> $A")
    assert masked(encoded(started, text), started) == "<s>⟦Once upon</s>⟧"
    assert asked(started, text) == ["<s>"]
    assert asked(bytes_tokenizer(), text) == ["</s>"]


def test_a_text_that_brings_its_start_token_gets_no_second_one():
    tokenizer = bytes_tokenizer(bos="<s>", frame="<s> $A </s>")
    assert masked(encoded(tokenizer, completion("<s>a", "b")), tokenizer) == "<s>a⟦b</s>⟧"
    assert asked(tokenizer, completion("<s>a", "b"), completion("a", "b")) == ["<s>a"] * 2


def test_everything_may_be_scored():
    tokenizer = bytes_tokenizer()
    assert masked(encoded(tokenizer, completion("a ", "b"), score="all"), tokenizer) == "a⟦ b</s>⟧"


def test_tokens_do_not_reach_over_the_border_of_prompt_and_answer():
    tokenizer = bytes_tokenizer(merges=(("a", "b"), ("c", "d")))
    assert tokenizer.tokenize("xab") == ["x", "ab"]
    sequences = encoded(tokenizer, completion("xa", "bcd"))
    assert tokenizer.convert_ids_to_tokens(sequences.inputs[0]) == ["x", "a", "b", "cd", "</s>"]
    assert [prompts(split(completion("xa", "bcd")), tokenizer, limit=9, encoder_decoder=False)[0]] == [
        sequences.inputs[0][:2]
    ]


def test_an_answer_is_read_as_it_stands_behind_its_prompt():
    """Llama 2's tokenizer puts a space before whatever it reads; in the midst of a text there is none to add."""
    letters = {letter: place for place, letter in enumerate("▁abcdefghijklmnopqrstuvwxyz")}
    model = Tokenizer(models.BPE({**letters, "</s>": 27}, []))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>")
    sequences = encoded(tokenizer, completion("who", " me"))
    assert "".join(tokenizer.convert_ids_to_tokens(sequences.inputs[0])) == "▁who▁me</s>"
    assert sequences.targets[0][:4] == [UNSCORED] * 4


def test_a_long_document_loses_its_end_and_keeps_the_words_around_it_and_the_answer():
    tokenizer = bytes_tokenizer()
    parts = (("Sum up: ", False), ("abcdefghij", False), ("\nIn short:", False), (" ab", True))
    example = Dialogue(tuple(Turn("text", words, scored) for words, scored in parts))
    sequences = encoded(tokenizer, example, example, limit=27)
    assert masked(sequences, tokenizer) == "Sum up: abcde\nIn short:⟦ ab</s>⟧"
    assert (len(sequences.inputs[0]), sequences.truncated) == (27, 2)
    assert encoded(tokenizer, example, limit=32).truncated == 0
    assert asked(tokenizer, example, limit=27, room=4) == ["Sum up: abcde\nIn short:"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_long_question_is_cut_inside_the_template(name):
    template, options = TEMPLATES[name]
    tokenizer = bytes_tokenizer(template, **options)
    long, short = (chat(("user", "q" * count), ("assistant", "Yes.")) for count in (90, 20))
    limit = len(encoded(tokenizer, short).inputs[0])
    sequences = encoded(tokenizer, long, limit=limit)
    assert sequences.truncated == 1
    assert masked(sequences, tokenizer) == masked(encoded(tokenizer, short), tokenizer)
    assert asked(tokenizer, long, limit=limit, room=limit - len(asked_ids(tokenizer, short))) == asked(tokenizer, short)


def asked_ids(tokenizer, example):
    return prompts(split(example), tokenizer, limit=1000, encoder_decoder=False)[0]


def test_letters_of_several_tokens_are_cut_whole():
    tokenizer = bytes_tokenizer()
    assert masked(encoded(tokenizer, completion("영화 ", "a"), limit=8), tokenizer) == "영화⟦a</s>⟧"
    assert masked(encoded(tokenizer, completion("영화 ", "a"), limit=7), tokenizer) == "영⟦a</s>⟧"


def test_a_tokenizer_that_does_not_say_where_its_tokens_stand_cuts_as_well(monkeypatch):
    tokenizer = bytes_tokenizer()
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    sequences = encoded(tokenizer, completion("abcdefghij ", "xyz"), limit=8)
    assert masked(sequences, tokenizer) == "abcd⟦xyz</s>⟧"
    assert sequences.truncated == 1


def test_an_answer_given_before_is_read_as_it_was_learnt():
    tokenizer = bytes_tokenizer()
    heard = Dialogue(tuple(Turn(turn.role, turn.content, place == 3) for place, turn in enumerate(TWO.turns)))
    learnt = encoded(tokenizer, TWO, heard)
    assert learnt.inputs[0] == learnt.inputs[1]
    assert masked(learnt, tokenizer, 1).count("⟦") == 1


def test_a_long_chat_loses_its_last_turns_first():
    tokenizer = bytes_tokenizer(CHATML)
    limit = len(encoded(tokenizer, ONE).inputs[0])
    sequences = encoded(tokenizer, TWO, limit=limit)
    assert masked(sequences, tokenizer) == masked(encoded(tokenizer, ONE), tokenizer)
    assert sequences.truncated == 1


def test_an_answer_that_is_too_long_by_itself_loses_its_end():
    tokenizer = bytes_tokenizer()
    sequences = encoded(tokenizer, completion("ab ", "cdefgh"), limit=4)
    assert masked(sequences, tokenizer) == "c⟦def⟧"


def test_an_example_with_nothing_left_to_learn_is_named():
    tokenizer = bytes_tokenizer(LLAMA3, bos="<s>")
    example = Dialogue(chat(("user", "How long\nis this?"), ("assistant", "Long.")).turns, row=17)
    with pytest.raises(
        UserError, match=r"row 17 \('How long is this\? Long\.'\) has no token to learn among its .* 20"
    ):
        encoded(tokenizer, completion("a ", "b"), example, limit=20)
    with pytest.raises(UserError, match=r"row 17 .* has no prompt of 20 tokens"):
        asked(tokenizer, example, limit=30, room=10)


HOSTILE = "{{ ''.__class__.__mro__[1].__subclasses__() }}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (HOSTILE, "fails: access to attribute '__class__' .* unsafe"),
        ("{{ messages.append(messages[0]) }}", "fails: .*unsafe"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "fails: Range too big"),
        ("{{ messages[0]['content'] ", "fails: unexpected end of template"),
        ("{{ raise_exception('no user, no answer') }}", "fails: no user, no answer"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
            "writes earlier turns otherwise",
        ),
        (
            "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}",
            "leaves out what the assistant",
        ),
    ],
)
def test_a_template_that_is_hostile_or_broken_is_refused(template, message):
    with pytest.raises(UserError, match=message) as error:
        encoded(bytes_tokenizer(template), ONE)
    assert "chat_template in its tokenizer_config.json" in error.value.hint


def test_roles_that_a_template_does_not_know_are_refused_in_its_own_words():
    with pytest.raises(UserError, match="fails: only user and assistant roles are supported"):
        encoded(bytes_tokenizer(MISTRAL, bos="<s>"), ADVISED)


def test_without_an_end_token_nothing_can_be_learnt():
    with pytest.raises(UserError, match="no end token"):
        encoded(bytes_tokenizer(eos=""), completion("a ", "b"))


@pytest.mark.parametrize("frame", ["$A </s>", "<s> $A </s>"])
def test_an_encoder_reads_the_prompt_and_the_decoder_learns_the_answer(frame):
    tokenizer = bytes_tokenizer(bos="<s>", frame=frame)
    examples = split(completion("Sum up: abc\n", " ab"), ADVISED)
    sequences = encode(examples, tokenizer, limit=100, encoder_decoder=True)
    first, last = frame.split(" $A ") if " $A " in frame else ("", "</s>")
    assert tokenizer.decode(sequences.inputs[0]) == f"{first}Sum up: abc\n{last}"
    assert tokenizer.decode(sequences.targets[0]) == f"{first}ab{last}"
    assert tokenizer.decode(sequences.inputs[1]) == (
        f"{first}Be brief.\n\n### Instruction:\nHi?\n\n### Response:\n{last}"
    )
    assert prompts(examples, tokenizer, limit=100, encoder_decoder=True, room=99) == list(sequences.inputs)


def test_what_an_encoder_or_its_decoder_cannot_hold_is_cut_at_the_end():
    tokenizer = bytes_tokenizer(frame="$A </s>")
    examples = split(completion("abcdef\n", "xyz"), completion("abc\n", "tuvwxyz"), completion("abc\n", "xyz"))
    sequences = encode(examples, tokenizer, limit=5, encoder_decoder=True)
    assert [tokenizer.decode(ids) for ids in sequences.inputs] == ["abcd</s>", "abc\n</s>", "abc\n</s>"]
    assert [tokenizer.decode(ids) for ids in sequences.targets] == ["xyz</s>", "tuvwx", "xyz</s>"]
    assert sequences.truncated == 2


def test_plain_text_gives_an_encoder_nothing_to_read():
    with pytest.raises(UserError, match=r"row 3 .'Once upon'. is plain text"):
        encode(
            split(Dialogue((Turn("text", "Once upon", scored=True),), row=3)),
            bytes_tokenizer(),
            limit=9,
            encoder_decoder=True,
        )
