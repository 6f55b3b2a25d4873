"""The last block on one token: what a classifier does not read is not computed, and nothing else changes."""

import pytest
import torch
from torch import Tensor

import deltatune
from deltatune import Full, Houlsby, LoRA, Parallel
from deltatune.training.pooled import pooled
from tiny import ARCHITECTURES, tiny_model

IDS = torch.tensor([[4, 5, 6, 7, 8], [9, 10, 11, 0, 0], [12, 13, 14, 15, 0]])
MASK = (IDS != 0).long()


def logits(model) -> Tensor:
    return model(input_ids=IDS, attention_mask=MASK).logits


def gradients(model) -> dict[str, Tensor]:
    logits(model).square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    "method", [LoRA(rank=2, init="gaussian"), Houlsby(reduction=4), Parallel(reduction=4), Full()], ids=lambda m: m.name
)
@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_logits_and_gradients_are_those_of_all_tokens(architecture: str, method) -> None:
    model = deltatune.attach(tiny_model(architecture), method)
    expected, plain = logits(model), gradients(model)
    seen: list[int] = []
    last = next(module for path, module in model.named_modules() if path.endswith("layer.1.intermediate"))
    last.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    with pooled(model, lambda: logits(model)) as on:
        assert on
        seen.clear()
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
        assert seen == [1]
        found = gradients(model)
    for name, gradient in plain.items():  # a bias of a key gets none but by rounding
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    seen.clear()
    logits(model)
    assert seen == [5], "afterwards the model is as it was"


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in ("bert", "roberta")])
def test_other_architectures_are_left_alone(architecture: str) -> None:
    model = tiny_model(architecture)
    with pooled(model, lambda: logits(model)) as on:
        assert not on


def test_a_classifier_of_another_token_keeps_them() -> None:
    model = tiny_model("bert")
    model.bert.pooler.register_forward_pre_hook(lambda _, args: (args[0].flip(1),))
    expected = logits(model)
    with pooled(model, lambda: logits(model)) as on:
        assert not on
        assert torch.equal(logits(model), expected)
