"""Texts in one row, without padding: each is computed as if it were alone, or the model keeps its padding."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import deltatune
from deltatune import Base, LoRA, Prefix, Prompt
from deltatune.data.sequences import UNSCORED, Sequences
from deltatune.models import short_attention
from deltatune.training.checkpointing import checkpointing
from deltatune.training.language import LanguageModelling
from deltatune.training.packing import beginnings, packed
from tiny import DECODERS, VOCABULARY, tiny_language_model, tokenizer

LENGTHS = (3, 5, 5, 9, 12)


def texts() -> Sequences:
    generator = torch.Generator().manual_seed(0)
    rows = tuple(torch.randint(4, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS)
    return Sequences(rows, tuple([UNSCORED, *row[1:]] for row in rows), 0)


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
    return LanguageModelling(Base(model.eval(), tokenizer("llama"), "", ""), "fp32")


def model(name: str) -> PreTrainedModel:
    return windowed() if name == "windowed" else tiny_language_model(name)


def rows_seen(of: LanguageModelling) -> list[int]:
    """How many rows the model is called with, from now on."""
    seen: list[int] = []
    hook = lambda _, __, inputs: seen.append(len(inputs["input_ids"]))  # noqa: E731
    of.model.register_forward_pre_hook(hook, with_kwargs=True)
    return seen


@pytest.mark.parametrize("name", [*DECODERS, "windowed"])
def test_a_packed_batch_has_the_loss_and_gradients_of_its_texts_alone(name: str) -> None:
    of, examples = task(model(name), LoRA(rank=2, init="gaussian")), texts()
    trained = {key: p for key, p in of.model.named_parameters() if p.requires_grad}
    plain = task(model(name), LoRA(rank=2, init="gaussian"), "eager")
    batch = of.collate(examples, range(len(examples)))
    of.backward(batch, batch.units)  # tries packing out
    of.model.zero_grad()
    rows = rows_seen(of)
    loss = of.backward(batch, batch.units)
    assert rows == [1]
    alone = sum(plain.backward(plain.collate(examples, [place]), batch.units) for place in range(len(examples)))
    assert loss == pytest.approx(alone, abs=1e-5)
    for key, parameter in plain.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(trained[key].grad, parameter.grad, atol=1e-6, rtol=1e-4)
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
        slots = beginnings(mask).diff(append=torch.tensor([3 * 8 + 2 * 12])).tolist()
        assert slots == [8, 8, 8, 12, 12]
        rows = [of.hidden(packed(of.model, one, mask))[0] for one in (ids, other)]
        assert {len(row) for row in rows} == {64}  # the next multiple of 32
        before, after = (row[:48].split(slots) for row in rows)
    for place, (ours, theirs) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(ours, theirs) == (place != 2)


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
