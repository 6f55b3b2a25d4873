"""The loop against plain formulas: what it computes, what it keeps, what it tells."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import deltatune
from conformance.cases import bits
from deltatune import Base, Full, Head, LoRA, Split, TextData, Training
from deltatune.data.tokens import Tokens
from deltatune.errors import UserError
from deltatune.models.attach import adapted_layers, trainable_parameters
from deltatune.training.events import Evaluated, Event, EventFile, Finished, Started, Step, read_events
from deltatune.training.loop import train
from deltatune.training.schedule import rate
from deltatune.training.tasks import task_for
from deltatune.training.tune import ignore
from tiny import VOCABULARY, save_tiny, tiny_model, tokenizer

GOOD, BAD = ("good", "great", "warm", "moving", "clever"), ("bad", "dull", "cold", "boring", "weak")


def reviews(count: int, seed: int) -> Split:
    """Texts of different lengths whose label is told by one word."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    labels = [draw(2) for _ in range(count)]
    texts = [f"the film is {'very ' * draw(6)}{(BAD, GOOD)[label][draw(5)]} and the plot" for label in labels]
    return Split(texts, labels)


DATA = TextData(
    "reviews", "", ("bad", "good"), reviews(120, 0), reviews(40, 1), reviews(40, 2), ("text",), "label", "made up"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("bases") / "bert", "bert")


def run(folder: Path, method=None, seed: int = 0, listen=ignore, **settings) -> deltatune.Tuned:
    settings = {"precision": "fp32", "batch_tokens": 128, "learning_rate": 5e-3, **settings}
    base = deltatune.load(str(folder), labels=DATA.labels, seed=seed)
    return deltatune.tune(base, DATA, method or LoRA(rank=4), Training(**settings), seed=seed, listen=listen)


def test_a_run_learns_what_can_be_learnt(folder: Path) -> None:
    assert run(folder, Full(), epochs=30, learning_rate=2e-3).validation.quality >= 0.9


@pytest.mark.parametrize("method", [LoRA(rank=4, dropout=0.1), Full(), Head()], ids=lambda method: method.name)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_seed_gives_the_same_bits(folder: Path, method, precision: str) -> None:
    first, second, other = (run(folder, method, seed, epochs=0.3, precision=precision) for seed in (0, 0, 1))
    a, b, c = (bits(tuned.base.model) for tuned in (first, second, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize(("init", "length"), [("eva", 1.0), ("lora-ga", 32**0.25 / 4)])
def test_a_method_that_begins_from_examples_gets_those_of_the_run(folder: Path, init: str, length: float) -> None:
    tuned = run(folder, LoRA(rank=2, init=init, targets="query"), epochs=0.1, learning_rate=1e-9)
    for layer in adapted_layers(tuned.base.model).values():
        torch.testing.assert_close(layer.delta.A.detach().norm(dim=1), torch.full((len(layer.delta.A),), length))


def test_a_run_leaves_the_random_numbers_of_the_program_alone(folder: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    run(folder, epochs=0.2)
    assert torch.equal(torch.rand(1), expected)


def tokens(count: int) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 12, (count,), generator=generator).tolist()
    ids = [torch.randint(4, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return Tokens(tuple({"input_ids": row} for row in ids), tuple(i % 3 for i in range(count)), 0)


def without_dropout(method):
    model = tiny_model("bert")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return deltatune.attach(model, method)


def settings(**changes) -> Training:
    return Training(**{"epochs": 1, "batch_tokens": 100_000, "precision": "fp32", "keep": "last", "clip": 0, **changes})


def trained(examples: Tokens, learning_rate: float = 1e-3, **changes) -> dict[str, torch.Tensor]:
    model = without_dropout(Full())
    train(
        task_for(Base(model, tokenizer("bert"), "", ""), "fp32"), examples, examples, settings(**changes),
        learning_rate=learning_rate, precision="fp32", seed=0, listen=ignore,
    )  # fmt: skip
    return bits(model)


def assert_like(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """All but the keys' biases are close: their true gradient is 0, and Adam makes a full step of its rounding."""
    for name, value in theirs.items():
        if not name.endswith("key.bias"):
            torch.testing.assert_close(ours[name], value, atol=2e-5, rtol=1e-4)


def test_a_step_is_that_of_plain_adamw_on_the_mean_loss_of_single_examples() -> None:
    examples = tokens(10)
    ours = trained(examples, schedule="constant", warmup=0, weight_decay=0.1)
    model = without_dropout(Full()).train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    losses = [
        F.cross_entropy(model(torch.tensor([row["input_ids"]])).logits, torch.tensor([label]))
        for row, label in zip(examples.fields, examples.labels, strict=True)
    ]
    torch.stack(losses).mean().backward()
    optimizer.step()
    assert_like(ours, model.state_dict())


def test_accumulated_batches_are_one_large_batch() -> None:
    examples = tokens(24)
    whole = trained(examples)
    parts = trained(examples, batch_tokens=30, accumulate=1000)
    assert_like(parts, whole)


def test_gradient_checkpointing_trains_to_the_same_bits(folder: Path) -> None:
    plain, checkpointed = (run(folder, epochs=1, gradient_checkpointing=on) for on in (False, True))
    ours, theirs = (trainable_parameters(tuned.base.model) for tuned in (plain, checkpointed))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_every_method_sees_the_same_examples_in_the_same_steps(folder: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    for method in (LoRA(rank=2), Full(), Head()):
        steps = seen.setdefault(method.name, [])
        run(folder, method, listen=lambda e, s=steps: s.append((e.examples, e.tokens)) if isinstance(e, Step) else None)
    assert seen["lora"] == seen["full"] == seen["head"]
    assert seen["full"][-1][0] == 2 * len(DATA.train)


def test_events_tell_the_run_and_survive_a_cut_off_line(folder: Path, tmp_path: Path) -> None:
    heard: list[Event] = []
    path = tmp_path / "events.jsonl"
    with EventFile(path) as file:
        tuned = run(folder, epochs=1.5, evaluations=2, listen=lambda event: (heard.append(event), file(event)))
    assert list(read_events(path)) == heard
    assert isinstance(heard[0], Started)
    assert isinstance(heard[-1], Finished)
    steps = [event for event in heard if isinstance(event, Step)]
    assert len(steps) == heard[0].steps == tuned.finished.steps
    assert steps[-1].epoch == 1.5
    validations = [event for event in heard if isinstance(event, Evaluated)]
    assert len(validations) == 3
    assert validations[-1].step == steps[-1].step
    path.write_text(path.read_text()[:-20])
    assert list(read_events(path)) == heard[:-1]


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_kept_weights_are_the_ones_that_were_scored(folder: Path, keep: str) -> None:
    validations: list[Evaluated] = []
    listen = lambda event: validations.append(event) if isinstance(event, Evaluated) else None  # noqa: E731
    tuned = run(folder, epochs=2, evaluations=3, learning_rate=0.05, keep=keep, listen=listen)
    kept = next(event for event in validations if event.step == tuned.finished.best_step)
    expected = max(validations, key=lambda e: (e.figures["accuracy"], -e.loss)) if keep == "best" else validations[-1]
    assert kept.figures == expected.figures == tuned.validation.figures
    task = task_for(tuned.base, "fp32")
    assert task.evaluate(task.encode(DATA.validation, 64)) == tuned.validation


def test_patience_stops_after_so_many_validations_without_a_better_one(folder: Path) -> None:
    heard: list[Event] = []
    tuned = run(folder, Head(), epochs=20, evaluations=1, learning_rate=0.5, patience=2, listen=heard.append)
    ranks = [(e.figures["accuracy"], -e.loss) for e in heard if isinstance(e, Evaluated)]
    best = ranks.index(max(ranks))
    assert len(ranks) == best + 3 < 20
    assert tuned.finished.steps == max(event.step for event in heard if isinstance(event, Step)) < heard[0].steps
    assert (tuned.validation.figures["accuracy"], -tuned.validation.loss) == ranks[best]


def test_a_run_that_diverges_stops_and_names_the_first_bad_tensor(folder: Path) -> None:
    with pytest.raises(UserError, match=r"stopped at step \d+: the loss is .*first bad gradient is that of ") as caught:
        run(folder, Full(), learning_rate=1e30, clip=0, epochs=2)
    assert "learning rate" in caught.value.hint
    heard: list[Event] = []
    with pytest.raises(UserError, match="stopped at step 1: the loss on validation is nan"):  # no second step to tell
        run(folder, Full(), learning_rate=1e30, clip=0, epochs=1, batch_tokens=100_000, listen=heard.append)
    assert [type(event) for event in heard] == [Started, Step]


def test_the_rate_rises_and_falls_as_stated() -> None:
    linear = [rate(step, 100, 0.1, "linear") for step in range(100)]
    assert linear[0] > 0
    assert max(linear) == linear[10] == 1
    assert linear[55] == pytest.approx(0.5)
    assert linear[99] == pytest.approx(1 / 90)
    assert rate(55, 100, 0.1, "cosine") == pytest.approx(0.5)
    assert rate(99, 100, 0.1, "cosine") == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert {rate(step, 100, 0, "constant") for step in range(100)} == {1.0}


def test_in_bf16_the_frozen_weights_are_bf16_and_the_masters_fp32(folder: Path) -> None:
    model = run(folder, epochs=0.2, precision="bf16").base.model
    types = {(parameter.requires_grad, parameter.dtype) for parameter in model.parameters()}
    assert types == {(True, torch.float32), (False, torch.bfloat16)}
