import json

import pytest

from command import write_table
from deltatune.data import DialogueData, TextData, load_data
from deltatune.errors import UserError

ROWS = 20


@pytest.fixture
def write(tmp_path):
    """Writes columns, given as functions of the row, as a JSON lines file."""

    def write(columns, name="data", rows=ROWS):
        path = tmp_path / f"{name}.jsonl"
        lines = [{column: make(i) for column, make in columns.items()} for i in range(rows)]
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def load(write):
    """Loads columns, given as functions of the row; further keywords go to load_data."""
    return lambda columns, **options: load_data(str(write(columns)), **options)


def numbered(word):
    return lambda i: f"{word} {i}"


def parity(i):
    return i % 2


def everything(data):
    return [example for part in (data.train, data.validation, data.test) for example in part.examples]


def first(data):
    """The turns of the first row."""
    example = next(example for example in everything(data) if example.row == 1)
    return [(turn.role, turn.content, turn.scored) for turn in example.turns]


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("prompt", "completion"),
        ("Prompt", "Response"),
        ("input", "output"),
        ("question", "answer"),
        ("source", "target"),
        ("document", "summary"),
        ("text", "summary"),
        ("dialogue", "summary"),
        ("article", "highlights"),
        ("meaning_representation", "human_reference"),
    ],
)
def test_prompts_and_completions_are_found_by_their_names(load, prompt, answer):
    data = load({"id": lambda i: i, prompt: numbered("ask"), answer: numbered("say")})
    assert isinstance(data, DialogueData)
    assert (data.task, data.text, data.label, data.labels) == ("generation", (prompt,), answer, ())
    assert first(data) == [("text", "ask 0\n", False), ("text", "say 0", True)]


def test_a_completion_that_begins_with_a_space_follows_its_prompt_directly(load):
    assert first(load({"prompt": numbered("ask"), "completion": numbered(" say")}))[0][1] == "ask 0"
    assert first(load({"prompt": lambda i: f"ask {i}\n\n", "completion": numbered("say")}))[0][1] == "ask 0\n\n"


def test_columns_with_names_of_their_own_may_be_given(load):
    columns = {"frage": numbered("ask"), "antwort": numbered("say"), "note": numbered("no")}
    data = load(columns, text=("frage",), label="antwort")
    assert (data.text, data.label) == (("frage",), "antwort")
    assert first(data) == [("text", "ask 0\n", False), ("text", "say 0", True)]


def test_an_instruction_is_a_chat_with_its_input_where_it_has_one(load):
    columns = {
        "instruction": numbered("do"),
        "input": lambda i: "" if i else "this",
        "output": lambda i: "so",
        "text": numbered("all"),
    }
    data = load(columns)
    assert (data.text, data.label, data.incomplete) == (("instruction", "input"), "output", 0)
    assert first(data) == [("user", "do 0\n\nthis", False), ("assistant", "so", True)]
    assert sorted(len(example.turns[0].content) for example in everything(data))[0] == len("do 1")
    assert first(load({"instruction": numbered("do"), "context": lambda i: None, "response": numbered("so")})) == [
        ("user", "do 0", False),
        ("assistant", "so 0", True),
    ]


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": None},
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Thanks."},
]


def test_a_chat_ends_with_what_the_assistant_says_last(load):
    told = numbered("Be brief.")
    data = load(
        {"prompt": numbered("no"), "messages": lambda i: [{**MESSAGES[0], "content": told(i)}, *MESSAGES[1:]]},
        system="Be long.",
    )
    assert (data.text, data.label) == (("messages",), "")
    assert first(data) == [
        ("system", "Be brief. 0", False),
        ("user", "Hi?", False),
        ("assistant", "", False),
        ("tool", "42", False),
        ("assistant", "Yes.", True),
    ]


def test_sharegpt_has_other_names_for_the_same(load):
    turns = [("human", "Hi?"), ("gpt", "Yes."), ("human", "So?"), ("gpt", "No.")]

    def conversation(i):
        return [{"from": who, "value": f"{said[:-1]} {i}{said[-1]}"} for who, said in turns]

    data = load({"conversations": conversation}, system="Be brief.")
    assert first(data) == [
        ("system", "Be brief.", False),
        ("user", "Hi 0?", False),
        ("assistant", "Yes 0.", True),
        ("user", "So 0?", False),
        ("assistant", "No 0.", True),
    ]


def test_a_chat_may_stand_in_columns_of_its_own(tmp_path):
    from datasets import Dataset, Features, Sequence, Value

    features = Features({"conversation": Sequence({"from": Value("string"), "value": Value("string")})})
    rows = [{"conversation": {"from": ["human", "gpt"], "value": [f"Hi {i}?", "Yes."]}} for i in range(ROWS)]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "chats.parquet")
    data = load_data(str(tmp_path / "chats.parquet"))
    assert first(data) == [("user", "Hi 0?", False), ("assistant", "Yes.", True)]


def test_plain_text_alone_is_learnt_whole(load):
    data = load({"text": lambda i: numbered("all")(i) if i > 1 else ["all 0", "  "][i]})
    assert (data.text, data.label, data.incomplete) == (("text",), "", 1)
    assert first(data) == [("text", "all 0", True)]


def test_a_table_with_labels_is_for_classification_until_the_task_says_otherwise(load):
    columns = {"text": numbered("words"), "label": parity, "summary": numbered("say")}
    assert isinstance(load(columns), TextData)
    assert load(columns).task == "classification"
    assert first(load(columns, task="generation"))[-1] == ("text", "say 0", True)
    assert first(load({"text": numbered("words"), "label": parity}, task="generation")) == [("text", "words 0", True)]
    assert load(columns | {"messages": lambda i: MESSAGES}).task == "classification"


@pytest.mark.parametrize(("text", "label"), [("question", "answer"), ("input", "output"), ("source", "target")])
def test_answers_that_repeat_as_labels_do_are_labels_until_the_task_says_otherwise(load, text, label):
    columns = {text: numbered("words"), label: lambda i: ["yes", "no"][i % 2]}
    assert load(columns).labels == ("no", "yes")
    assert first(load(columns, task="generation")) == [("text", "words 0\n", False), ("text", "yes", True)]


def test_free_text_is_read_as_labels_where_the_task_says_so(load):
    with pytest.raises(UserError, match="these are no classes"):
        load({"text": numbered("words"), "summary": numbered("say")}, task="classification", label="summary")


def test_a_system_prompt_makes_a_chat_of_prompt_and_completion(load):
    data = load({"prompt": numbered("ask"), "completion": numbered("say")}, system="Be brief.")
    assert first(data) == [("system", "Be brief.", False), ("user", "ask 0", False), ("assistant", "say 0", True)]
    assert data.system == "Be brief."


def test_a_template_puts_words_around_columns(load):
    columns = {"title": numbered("on"), "dialogue": numbered("ask"), "summary": numbered("say"), "topic": parity}
    data = load(columns, template="{title}: {{sum up}} {dialogue}\nSummary:")
    assert (data.text, data.label) == (("title", "dialogue"), "summary")
    assert first(data) == [
        ("text", "on 0", False),
        ("text", ": {", False),
        ("text", "sum up}", False),
        ("text", " ", False),
        ("text", "ask 0", False),
        ("text", "\nSummary:", False),
        ("text", " say 0", True),
    ]


def test_rows_that_lack_a_part_are_dropped_and_counted(load):
    data = load({"prompt": lambda i: [None, " ", "ask"][min(i, 2)] + str(i) * (i > 1) if i else None,
                 "completion": lambda i: "" if i == 5 else f"say {i}"})  # fmt: skip
    assert data.incomplete == 3
    assert sorted(example.row for example in everything(data)) == [3, 4, 5, *range(7, ROWS + 1)]
    chats = load({"messages": lambda i: MESSAGES[:2] if i < 4 else [{**MESSAGES[1], "content": f"{i}"}, MESSAGES[4]]})
    assert chats.incomplete == 4


def test_no_prompt_of_training_comes_again_in_a_split_that_was_made(load):
    data = load({"prompt": lambda i: f"ask {i % 10}", "completion": numbered("say")})
    assert data.duplicates == 10
    prompts = [example.prompt for example in everything(data)]
    assert len(set(prompts)) == len(prompts) == 10
    assert "different training rows each, drawn by lot, seed 0" in data.splitting


def test_the_same_examples_come_from_every_format(write, tmp_path):
    rows = [(f"질문 {i}", f"답 {i}") for i in range(ROWS)]
    table = write_table(tmp_path / "data.csv", [("prompt", "completion"), *rows])
    lines = write({"prompt": lambda i: rows[i][0], "completion": lambda i: rows[i][1]})
    assert load_data(str(table)).train == load_data(str(lines)).train


def test_a_test_split_without_answers_counts_as_missing(write, tmp_path):
    write({"prompt": numbered("ask"), "completion": numbered("say")}, "train")
    write({"prompt": numbered("new")}, "test")
    data = load_data(str(tmp_path))
    assert (len(data.train), len(data.validation), len(data.test)) == (16, 2, 2)
    assert data.splitting.endswith("the test split that came along has no completions")


def test_a_limit_takes_rows_by_lot_in_the_order_of_the_file(load):
    data = load({"prompt": numbered("ask"), "completion": numbered("say")})
    small = data.limited(5, 1, None, seed=0)
    assert [len(small.train), len(small.validation), len(small.test)] == [5, 1, 2]
    assert [example.row for example in small.train.examples] == sorted(example.row for example in small.train.examples)
    assert small.splitting.endswith("limited to 5 train, 1 validation and 2 test rows, drawn by lot, seed 0")
    assert small.train != data.limited(5, 1, None, seed=1).train
    with pytest.raises(UserError, match="a limit of 0 on the train rows leaves none"):
        data.limited(0, None, None, seed=0)


PAIR = {"prompt": numbered("ask"), "completion": numbered("say")}


@pytest.mark.parametrize(
    ("columns", "options", "message", "hint"),
    [
        (PAIR, {"task": "regression"}, "no task named 'regression'", "generation"),
        (PAIR, {"task": "classification", "system": "Be brief."}, "no system prompt and no template", "leave them out"),
        (PAIR, {"text": ("promt",)}, "no column 'promt'", "'prompt'"),
        (
            PAIR,
            {"task": "generation", "text": ("prompt", "completion")},
            "cannot use 'prompt', 'completion'",
            "--label",
        ),
        (PAIR, {"template": "Sum up: {document}"}, "no column 'document'", "nearest"),
        (PAIR, {"template": "Sum up:"}, "names no column", "'Summarise: {document}'"),
        (PAIR, {"template": "Sum up: {}"}, "braces without a column's name", "{{ and }}"),
        (PAIR, {"template": "Sum up: {prompt.__class__}"}, "no column 'prompt.__class__'", "nearest"),
        (PAIR, {"template": "Sum up: {prompt!r}"}, "braces without a column's name alone", "{{ and }}"),
        (PAIR, {"template": "Sum up: {prompt"}, "cannot be read: expected '}'", "{{ and }}"),
        (
            PAIR,
            {"template": "{prompt} {completion}", "label": "completion"},
            "'completion', which is to be",
            "leave it",
        ),
        (PAIR, {"template": "{prompt}", "text": ("prompt",)}, "names the prompt's columns already", "--text"),
        ({"a": numbered("a"), "b": numbered("b")}, {"template": "{a}"}, "no column looks like completions", "--label"),
        ({"text": numbered("a")}, {"system": "Be brief."}, "no place before plain text", "leave it out"),
        ({"a": numbered("a"), "b": numbered("b")}, {"task": "generation"}, "could be the text: 'a', 'b'", "--text"),
        ({"prompt": lambda i: i, "completion": numbered("b")}, {}, "column 'prompt' holds numbers, not text", "--text"),
        ({"prompt": numbered("a"), "completion": lambda i: None}, {}, "none of the 20 rows has text", "--text"),
        ({"messages": lambda i: MESSAGES[:2]}, {}, "none of the 20 rows has an assistant's turn", "messages"),
        (
            {"messages": lambda i: [{"role": "User" if i < 3 else "judge", "content": "a"}, MESSAGES[4]]},
            {},
            "row 4 of 'messages' has a message by 'judge'",
            "known: user, human, assistant, gpt",
        ),
        (
            {"messages": lambda i: [{"role": "user", "content": ["a"]}, {"role": "user", "content": ["b"]}]},
            {},
            "row 1 of 'messages' has a message that is not a role and a text",
            '{"from": "human", "value": "…"}',
        ),
    ],
)
def test_data_that_cannot_be_learnt_from_is_refused_with_a_hint(load, columns, options, message, hint):
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as error:
        load(columns, **options)
    assert hint in error.value.hint
