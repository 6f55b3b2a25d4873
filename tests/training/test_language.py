"""Learning to write: the loss of scored tokens in chunks is the plain one, and a run teaches what can be learnt."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import deltatune
from deltatune import Base, Full, LoRA, NoTraining, Prefix, Prompt, Training
from deltatune.data.batches import Batch
from deltatune.data.sequences import UNSCORED, Sequences
from deltatune.training import language
from deltatune.training.language import LanguageModelling
from deltatune.training.loop import train
from deltatune.training.tune import ignore
from tiny import VOCABULARY, tiny_language_model, tokenizer

ARCHITECTURES = ("gpt2", "llama", "qwen2", "t5", "bart")
BOTH = ("t5", "bart")


def sequences(architecture: str, count: int = 6) -> Sequences:
    """Examples of 3 to 12 tokens of which the second half is scored."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, VOCABULARY, (3 + 9 * n // count,), generator=generator).tolist() for n in range(count)]
    if architecture in BOTH:
        return Sequences(tuple(rows), tuple([*row[::2], 2] for row in rows), 0)
    targets = tuple([UNSCORED] * (len(row) // 2) + row[len(row) // 2 :] for row in rows)
    return Sequences(tuple(rows), targets, 0)


def task(architecture: str, method=None) -> LanguageModelling:
    return on(tiny_language_model(architecture), architecture, method)


def on(model: PreTrainedModel, architecture: str = "llama", method=None) -> LanguageModelling:
    if method is not None:
        deltatune.attach(model, method)
    model.config.pad_token_id = 0
    return LanguageModelling(Base(model.eval(), tokenizer(architecture), "", ""), "fp32")


def plain_loss(of: LanguageModelling, batch: Batch) -> torch.Tensor:
    """The mean over scored tokens as Transformers computes it, with all logits."""
    return of.model(**batch.inputs, labels=batch.labels).loss


def gradients(of: LanguageModelling) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in of.model.named_parameters() if p.grad is not None}
    of.model.zero_grad()
    return found


METHODS = (Full(), LoRA(rank=2), Prompt(virtual_tokens=3), Prefix(virtual_tokens=3))
CASES = [(name, method) for name in ARCHITECTURES for method in METHODS if (name, method.name) != ("bart", "prefix")]


@pytest.mark.parametrize(("architecture", "method"), CASES, ids=lambda value: getattr(value, "name", value))
def test_the_loss_in_chunks_and_its_gradients_are_those_of_all_logits_at_once(
    architecture: str, method, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "_TRAINED", 1)  # the smallest chunks there are: 16 tokens
    of, examples = task(architecture, method), sequences(architecture)
    batch = of.collate(examples, range(len(examples)))
    assert batch.units > 16
    expected = plain_loss(of, batch)
    expected.backward()
    theirs = gradients(of)
    assert of.backward(batch, batch.units) == pytest.approx(expected.item(), rel=1e-5)
    ours = gradients(of)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_loss_of_a_batch_is_the_mean_over_its_tokens_alone(architecture: str) -> None:
    of, examples = task(architecture), sequences(architecture)
    together = of.evaluate(examples)
    alone = [of.evaluate(Sequences(examples.inputs[n : n + 1], examples.targets[n : n + 1], 0)).loss for n in range(6)]
    torch.testing.assert_close(torch.tensor(together.values), torch.tensor(alone), atol=1e-5, rtol=0)
    scored = [sum(target != UNSCORED for target in row) for row in examples.targets]
    if architecture not in BOTH:
        assert all(examples.targets[n][0] == UNSCORED for n in range(6)), "a first token cannot be predicted"
    mean = sum(loss * count for loss, count in zip(alone, scored, strict=True)) / sum(scored)
    assert together.loss == pytest.approx(mean, abs=1e-5)
    assert together.figures["perplexity"] == pytest.approx(torch.tensor(mean).exp().item(), rel=1e-4)


def test_a_model_that_changes_its_logits_afterwards_has_them_all() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = AutoConfig.for_model("granite", vocab_size=VOCABULARY, logits_scaling=4.0, **sizes)
    of, examples = on(AutoModelForCausalLM.from_config(config)), sequences("llama")
    batch = of.collate(examples, range(6))
    assert of.backward(batch, batch.units) == pytest.approx(plain_loss(of, batch).item(), rel=1e-5)


def test_all_logits_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "_TRAINED", 1)
    monkeypatch.setattr(language, "_SCORED", 1)
    of, examples = task("llama"), sequences("llama")
    made: list[int] = []
    of.model.get_output_embeddings().register_forward_hook(lambda _, __, output: made.append(output.shape[:-1].numel()))
    batch = of.collate(examples, 4 * [*range(6)])
    of.backward(batch, batch.units)
    of.evaluate(examples)
    made = made[2:]  # the one example that is tried out
    assert batch.units == 84
    assert made == [32] * 3 + [32]  # whole rows of 32: 84 scored tokens, and 21 that are evaluated


def test_without_anything_to_train_a_run_scores_the_model_as_it_is() -> None:
    of, examples = task("gpt2", NoTraining()), sequences("gpt2")
    finished, scores = train(
        of, examples, examples, Training(), learning_rate=1e-3, precision="fp32", seed=0, listen=ignore
    )
    assert finished.steps == 0
    assert scores == of.evaluate(examples)
