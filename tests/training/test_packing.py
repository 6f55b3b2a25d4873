"""Texts in one row, without padding: each is computed as if it were alone, or the model keeps its padding."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import deltatune
from deltatune import Base, LoRA, Prefix, Prompt, kernels
from deltatune.data.sequences import UNSCORED, Sequences
from deltatune.models import short_attention
from deltatune.training.checkpointing import checkpointing
from deltatune.training.language import LanguageModelling, read_tokens
from deltatune.training.packing import common_beginning
from tiny import DECODERS, VOCABULARY, tiny_language_model, tokenizer

LENGTHS = (3, 5, 5, 9, 12)


def texts() -> Sequences:
    generator = torch.Generator().manual_seed(0)
    rows = tuple(torch.randint(4, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS)
    return Sequences(rows, tuple([UNSCORED, *row[1:]] for row in rows), 0)


def alike_texts(*, scored_from: int = 1) -> Sequences:
    """Texts that begin with the same two tokens; the last three end with some that nobody scores."""
    rows = tuple([5, 6, *row[2:]] for row in texts().inputs)
    ends = [len(row) - (2 if len(row) > 5 or row is rows[2] else 0) for row in rows]
    targets = ([*[UNSCORED] * scored_from, *row[scored_from:end]] for row, end in zip(rows, ends, strict=True))
    filled = ([*target, *[UNSCORED] * (len(row) - len(target))] for row, target in zip(rows, targets, strict=True))
    return Sequences(rows, tuple(filled), 0)


def windowed() -> PreTrainedModel:
    """A model that sees four tokens back in every other layer."""
    config = AutoConfig.for_model(
        "gemma3_text", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, intermediate_size=64, sliding_window=4, pad_token_id=0, initializer_range=0.3,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)


def task(model: PreTrainedModel, method=None, attention: str = short_attention.NAME) -> LanguageModelling:
    model.set_attn_implementation(attention)
    if method is not None:
        deltatune.attach(model, method)
    model.config.pad_token_id = 0
    return LanguageModelling(of_base(model.eval()), "fp32")


def of_base(model: PreTrainedModel) -> Base:
    return Base(model, tokenizer("llama"), "", "")


def model(name: str) -> PreTrainedModel:
    return windowed() if name == "windowed" else tiny_language_model(name)


def calls(of: LanguageModelling) -> list[dict]:
    """What the model is called with, from now on."""
    seen: list[dict] = []
    of.model.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs), with_kwargs=True)
    return seen


def rows_seen(of: LanguageModelling) -> list[int]:
    """How many rows the model is called with, from now on."""
    seen: list[int] = []
    hook = lambda _, __, inputs: seen.append(len(inputs["input_ids"]))  # noqa: E731
    of.model.register_forward_pre_hook(hook, with_kwargs=True)
    return seen


@pytest.fixture(params=[True, False], ids=["loop", "plain"])
def attends(request, monkeypatch) -> None:
    """Attention in the compiled loop, where it is here, and by products."""
    if not request.param:
        monkeypatch.setattr(kernels, "attends", lambda *_: False)


@pytest.mark.parametrize(
    "examples", [texts(), alike_texts(), alike_texts(scored_from=2)], ids=["apart", "alike", "alike-unscored"]
)
@pytest.mark.parametrize("name", [*DECODERS, "windowed"])
@pytest.mark.usefixtures("attends")
def test_a_packed_batch_has_the_loss_and_gradients_of_its_texts_alone(name: str, examples: Sequences) -> None:
    of = task(model(name), LoRA(rank=2, init="gaussian"))
    trained = {key: p for key, p in of.model.named_parameters() if p.requires_grad}
    plain = task(model(name), LoRA(rank=2, init="gaussian"), "eager")
    batch = of.collate(examples, range(len(examples)))
    of.backward(batch, batch.units)  # tries packing out
    of.model.zero_grad()
    called = calls(of)
    loss = of.backward(batch, batch.units)
    assert [len(inputs["input_ids"]) for inputs in called] == [1]
    assert called[0].get("shared_tokens", 0) == common_beginning(batch.inputs["input_ids"], read_tokens(batch.labels))
    alone = sum(plain.backward(plain.collate(examples, [place]), batch.units) for place in range(len(examples)))
    assert loss == pytest.approx(alone, abs=1e-5)
    for key, parameter in plain.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(trained[key].grad, parameter.grad, atol=2.9e-5 / batch.units, rtol=1e-4)
    each = torch.tensor(of.evaluate(examples).values)
    torch.testing.assert_close(each, torch.tensor(plain.evaluate(examples).values), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [*DECODERS, "windowed"])
def test_nothing_of_a_text_reaches_its_neighbours(name: str) -> None:
    of = task(model(name))
    lengths = torch.tensor(LENGTHS)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = (torch.arange(max(LENGTHS)) < lengths[:, None]).long()
    other = ids.clone()
    other[2] = (ids[2] + 7) % VOCABULARY
    with torch.no_grad():
        of.try_out(of.collate(texts(), range(5)))
        assert of.packing is not None
        rows = [of.packing.row(one, lengths) for one in (ids, other)]
        before, after = (of.hidden(row.inputs)[0][row.places[mask.bool()]] for row in rows)
        changed = torch.repeat_interleave(torch.arange(5) == 2, lengths)
    assert [len(row.inputs["input_ids"][0]) % 32 for row in rows] == [0, 0]
    assert torch.equal(before[~changed], after[~changed])
    assert not torch.isclose(before[changed], after[changed]).all(1).any()


@pytest.mark.usefixtures("attends")
def test_what_all_texts_share_is_computed_once_and_what_nobody_scores_not_at_all() -> None:
    of, examples = task(tiny_language_model("llama")), alike_texts()
    batch = of.collate(examples, range(5))
    read = read_tokens(batch.labels)
    assert read.tolist() == [2, 4, 2, 6, 9]  # what is said last is not read
    of.try_out(batch)
    assert of.packing is not None
    row = of.packing.row(batch.inputs["input_ids"], read)
    assert row.inputs["shared_tokens"] == 1  # to each a token of its own is left
    sizes = row.inputs["cu_seq_lens_q"].diff().tolist()
    assert sizes[:5] == ([2, 3, 1, 5, 8] if kernels.wide() else [8, 8, 8, 8, 9])
    assert row.places[:, 0].tolist() == [0] * 5
    assert len({*row.places[:, 1].tolist()}) == 5


@pytest.mark.parametrize("drops", ["method", "base", "neither"])
def test_texts_that_are_dropped_from_share_nothing_while_they_train(drops: str) -> None:
    base = tiny_language_model("llama")
    of = task(base, LoRA(rank=2, dropout=0.3 if drops == "method" else 0.0))
    if drops == "base":
        for block in base.model.layers:
            block.self_attn.attention_dropout = 0.2
    batch = of.collate(alike_texts(), range(5))
    of.model.train()
    of.backward(batch, batch.units)
    called = calls(of)
    state = torch.get_rng_state()
    of.backward(batch, batch.units)
    of.evaluate(alike_texts())
    assert [inputs.get("shared_tokens", 0) for inputs in called] == [int(drops == "neither"), 1]
    assert torch.equal(state, torch.get_rng_state()) == (drops == "neither")


def test_texts_share_nothing_where_it_is_left_out() -> None:
    of = task(tiny_language_model("llama"))
    without = LanguageModelling(of_base(of.model), "fp32", shares=False)
    batch = without.collate(alike_texts(), range(5))
    without.try_out(batch)
    called = calls(without)
    without.evaluate(alike_texts())
    assert [(len(inputs["input_ids"]), inputs.get("shared_tokens")) for inputs in called] == [(1, None)]


def test_checkpointed_blocks_are_told_where_texts_begin_again() -> None:
    losses, gradients = [], []
    for checkpointed in (False, True):
        of, examples = task(tiny_language_model("llama"), LoRA(rank=2, init="gaussian")), texts()
        batch = of.collate(examples, range(len(examples)))
        of.model.train()
        rows = rows_seen(of)
        with checkpointing(of.model, checkpointed):
            losses.append(of.backward(batch, batch.units))
        assert rows[-1] == 1
        gradients.append(torch.cat([p.grad.flatten() for p in of.model.parameters() if p.grad is not None]))
    assert losses[0] == losses[1]
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("name", "method", "attention"),
    [
        ("llama", Prompt(virtual_tokens=3), short_attention.NAME),
        ("llama", Prefix(virtual_tokens=3), short_attention.NAME),
        ("llama", None, "sdpa"),
        ("t5", None, short_attention.NAME),
    ],
    ids=("prompt", "prefix", "sdpa", "t5"),
)
def test_what_cannot_tell_texts_apart_keeps_its_padding(name: str, method, attention: str) -> None:
    of, examples = task(tiny_language_model(name), method, attention), texts()
    batch = of.collate(examples, range(len(examples)))
    of.backward(batch, batch.units)
    rows = rows_seen(of)
    of.backward(batch, batch.units)
    assert rows[0] == len(examples)


def test_an_architecture_that_passes_nothing_on_to_its_attention_keeps_its_padding() -> None:
    """Mamba mixes tokens by a recurrence, which knows nothing of where texts begin."""
    config = AutoConfig.for_model("mamba", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, state_size=4)
    of, examples = task(AutoModelForCausalLM.from_config(config), attention="eager"), texts()
    of.model.config._attn_implementation = short_attention.NAME
    batch = of.collate(examples, range(len(examples)))
    of.backward(batch, batch.units)
    rows = rows_seen(of)
    of.backward(batch, batch.units)
    assert rows == [len(examples)]
