"""What enters the lowest trained block is computed once, and using it again changes no bit."""

import logging
from collections import Counter
from pathlib import Path

import pytest
import torch

import deltatune
from deltatune import Base, BitFit, Full, Head, LastK, LoRA, Training
from deltatune.data.tokens import Tokens
from deltatune.errors import UserError
from deltatune.methods import Method
from deltatune.models.blocks import stacks
from deltatune.training.events import Step
from deltatune.training.loop import train
from deltatune.training.precision import prepare
from deltatune.training.prefix import Prefix
from deltatune.training.tasks import task_for
from tiny import VOCABULARY, tiny_inputs, tiny_model, tokenizer

BATCHES, EPOCHS = 5, 2


def tokens() -> Tokens:
    """Random examples of 2 to 9 tokens that end as sentences do: four batches of at most 40 tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 10, (22,), generator=generator).tolist()
    ids = [[*torch.randint(4, VOCABULARY, (length - 1,), generator=generator).tolist(), 2] for length in lengths]
    return Tokens(tuple({"input_ids": row} for row in ids), tuple(place % 3 for place in range(len(ids))), 0)


def run(architecture: str, method: Method, **settings) -> tuple[list[float], dict[str, list[int]]]:
    """The loss of each step, and how often each block of the base ran for it."""
    model = deltatune.attach(tiny_model(architecture), method)
    model.set_attn_implementation("eager")
    whole = {"epochs": EPOCHS, "precision": "fp32", "batch_tokens": 40, "keep": "last", "evaluations": 1, **settings}
    training = Training(**whole)
    prepare(model, training.precision)
    losses: list[float] = []
    now: Counter[str] = Counter()
    runs: dict[str, list[int]] = {path: [] for stack in stacks(model) for path in stack}

    def note(path: str) -> None:
        if torch.is_grad_enabled():  # not while scoring, nor while it is tried out
            now[path] += 1

    def listen(event: object) -> None:
        if isinstance(event, Step):
            losses.append(event.loss)
            for path in runs:
                runs[path].append(now[path])
            now.clear()

    for path in runs:
        *_, layer = (module for module in model.get_submodule(path).modules() if not list(module.children()))
        layer.register_forward_hook(lambda *_, path=path: note(path))
    train(
        task_for(Base(model, tokenizer("bert"), "", ""), training.precision), tokens(), tokens(), training,
        learning_rate=1e-2, precision=training.precision, seed=0, listen=listen,
    )  # fmt: skip
    return losses, runs


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said of the cache."""
    return [record.message for record in caplog.records if record.message.startswith("cache: ")]


CASES = {
    "bert": (LastK(k=1), 1),
    "gpt2": (LastK(k=1), 1),
    "t5": (LastK(k=1), 3),
    "qwen2": (LoRA(rank=2, targets=r"layers.1.*q_proj", dropout=0.3), 1),
    "roberta": (Head(), 2),
}
"""For each architecture a method, and how many blocks lie below all that it trains."""


@pytest.mark.parametrize("architecture", CASES)
def test_losses_are_the_same_bits_with_and_without_the_cache(architecture: str) -> None:
    method, frozen = CASES[architecture]
    plain, before = run(architecture, method)
    cached, after = run(architecture, method, cache="10MB")
    assert cached == plain
    assert len(set(plain)) == len(plain) == BATCHES * EPOCHS, "the losses say something"
    for place, path in enumerate(before):
        every = [1] * (BATCHES * EPOCHS)
        every[0] += 1  # to find what is frozen
        assert before[path] == every
        assert after[path] == (every[:BATCHES] + [0] * BATCHES * (EPOCHS - 1) if place < frozen else every)


@pytest.mark.parametrize(
    "settings", [{"precision": "bf16"}, {"gradient_checkpointing": True, "accumulate": 3}], ids=str
)
def test_so_they_are_in_16_bits_checkpointed_and_accumulated(settings: dict) -> None:
    plain, _ = run("t5", LastK(k=1), **settings)
    cached, _ = run("t5", LastK(k=1), cache="10MB", **settings)
    assert cached == plain


def test_what_is_kept_can_lie_on_disk_and_leaves_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run("t5", LastK(k=1), cache="10MB", cache_on="disk") == run("t5", LastK(k=1), cache="10MB")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_or_a_budget_used_up_costs_time_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, often = run("bert", LastK(k=1))
    one_batch = 40 * 32 * 4
    some, seldom = run("bert", LastK(k=1), cache=2 * one_batch)
    assert said(caplog) == ["cache: its budget is used up after 2 batches; the others are computed anew"]
    assert some == plain
    lowest = next(iter(often))
    assert sum(often[lowest]) - sum(seldom[lowest]) == 2 * (EPOCHS - 1)
    caplog.clear()
    monkeypatch.setattr("tempfile.tempdir", "/proc/self")  # where nothing can be written
    assert run("bert", LastK(k=1), cache="10MB", cache_on="disk") == (plain, often)
    [line] = said(caplog)
    assert line.startswith("cache: its file could not be written: ")


@pytest.mark.parametrize("method", [LoRA(rank=2), Full(), BitFit(), LastK(k=2)], ids=lambda method: method.name)
def test_where_no_block_is_frozen_one_line_says_so(method: Method, caplog: pytest.LogCaptureFixture) -> None:
    run("bert", method, cache="10MB", epochs=0.1)
    assert said(caplog) == ["cache: not used, no block lies below everything that trains"]


def test_what_is_random_below_and_no_module_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model = deltatune.attach(tiny_model("bert"), LastK(k=1)).train()
    model.bert.embeddings.register_forward_hook(lambda _, __, output: torch.nn.functional.dropout(output, 0.5))
    prefix = Prefix(model, 10**6)
    with caplog.at_level(logging.WARNING):
        prefix.freeze(lambda: model(**tiny_inputs()).logits)
    assert not prefix.stacks
    assert "something random lies below" in caplog.text


def test_dropout_is_off_below_the_lowest_trained_block_and_on_above() -> None:
    model = deltatune.attach(tiny_model("bert"), LastK(k=1)).train()
    Prefix(model).freeze(lambda: model(**tiny_inputs()).logits)
    off = {
        path for path, module in model.named_modules() if isinstance(module, torch.nn.Dropout) and not module.training
    }
    on = {path for path, module in model.named_modules() if isinstance(module, torch.nn.Dropout) and module.training}
    assert off == {
        "bert.embeddings.dropout",
        *(
            f"bert.encoder.layer.0.{end}"
            for end in ("attention.self.dropout", "attention.output.dropout", "output.dropout")
        ),
    }
    assert len(on) == 4
    whole = deltatune.attach(tiny_model("bert"), LoRA(rank=2)).train()
    Prefix(whole).freeze(lambda: whole(**tiny_inputs()).logits)
    assert all(module.training for module in whole.modules())


def test_a_budget_is_written_as_people_write_it() -> None:
    assert Training(cache="1.5 GB").cache == 1_500_000_000
    assert Training(cache="512MiB").cache == 512 * 2**20
    assert Training(cache=1000).cache == 1000
    with pytest.raises(UserError, match=r"training\.cache") as caught:
        deltatune.make_experiment({"training": {"cache": "3 apples"}})
    assert "1GB" in caught.value.hint
