"""A step with all its fast pieces has the gradients of a plain one: PEFT's in fp32, as near to them as PEFT in bf16."""

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

import deltatune
from deltatune import Base, DoRA, LoRA
from deltatune.data.batches import Batch
from deltatune.data.sequences import UNSCORED, Sequences
from deltatune.data.tokens import Tokens
from deltatune.models.adapted import AdaptedLinear
from deltatune.training.pieces import quicken
from deltatune.training.pooled import pooled
from deltatune.training.precision import Computed, autocast, prepare
from deltatune.training.task import Task
from deltatune.training.tasks import task_for
from tiny import VOCABULARY, tiny_language_model, tiny_model, tokenizer

LENGTHS = (5, 9, 21, 30)
CLASSIFIERS, DECODERS = ("bert", "roberta", "distilbert"), ("gpt2", "llama", "qwen2")


def base(architecture: str) -> PreTrainedModel:
    model = tiny_model(architecture, labels=2) if architecture in CLASSIFIERS else tiny_language_model(architecture)
    model.config.pad_token_id = model.config.pad_token_id or 0
    return model.eval()  # masks of dropout would differ


def ours(architecture: str, precision: Computed, method: type[LoRA | DoRA]) -> tuple[PreTrainedModel, Task]:
    model = deltatune.attach(base(architecture), method(rank=4, targets="all-linear"), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, delta in deltas(model):
            delta.B.normal_(0, 0.1, generator=generator)
    prepare(model, precision)
    quicken(model, 64)
    return model, task_for(Base(model, tokenizer(architecture), "", ""), precision)


def deltas(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (path, next(iter(layer.deltas.values())))
        for path, layer in model.named_modules()
        if isinstance(layer, AdaptedLinear)
    ]


def theirs(architecture: str, precision: Computed, like: PreTrainedModel) -> nn.Module:
    """PEFT's LoRA, or its DoRA, with the same parameters, over a base in that precision."""
    plain = base(architecture)
    plain.set_attn_implementation("eager")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=[path for path, _ in deltas(like)], init_lora_weights=False,
        fan_in_fan_out=architecture == "gpt2", use_dora=isinstance(like.attachment.method, DoRA),
    )  # fmt: skip
    model = peft.get_peft_model(plain.to(torch.bfloat16 if precision == "bf16" else torch.float32), config)
    with torch.no_grad():
        for path, delta in deltas(like):
            layer = plain.get_submodule(path)
            for name, matrix in (("lora_A", delta.A), ("lora_B", delta.B)):
                getattr(layer, name)["default"].weight.data = matrix.detach().float().clone()
            if config.use_dora:
                layer.lora_magnitude_vector["default"].weight.data = delta.m.detach().float().clone()
    return model


def encoded(architecture: str) -> Tokens | Sequences:
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(4, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    if architecture in CLASSIFIERS:
        return Tokens(tuple({"input_ids": row} for row in rows), (0, 1, 1, 0), 0)
    rows = [[5, 6, *row[2:]] for row in rows]  # what they share is computed once
    return Sequences(tuple(rows), tuple([UNSCORED, *row[1:]] for row in rows), 0)


def plain_loss(model: nn.Module, batch: Batch, precision: Computed) -> torch.Tensor:
    with autocast(precision, torch.device("cpu")):
        logits = model(**batch.inputs).logits.float()
    if batch.labels.ndim == 1:
        return F.cross_entropy(logits, batch.labels)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=UNSCORED)


def gradients(model: nn.Module, like: PreTrainedModel) -> torch.Tensor:
    """Of all A and B, and m, in one row."""
    if model is like:
        found = [matrix.grad for _, delta in deltas(like) for matrix in delta.parameters()]
    else:
        layers = [model.get_base_model().get_submodule(path) for path, _ in deltas(like)]
        parts = [getattr(one, part) for one in layers for part in ("lora_A", "lora_B", "lora_magnitude_vector")]
        found = [part["default"].weight.grad for part in parts if "default" in part]
    return torch.cat([gradient.double().flatten() for gradient in found])


@pytest.mark.parametrize("method", [LoRA, DoRA])
@pytest.mark.parametrize("architecture", [*CLASSIFIERS, *DECODERS])
def test_gradients_are_pefts_in_fp32_and_as_near_to_them_in_bf16(architecture: str, method: type[LoRA | DoRA]) -> None:
    found: dict[tuple[str, Computed], torch.Tensor] = {}
    precisions: tuple[Computed, ...] = ("fp32", "bf16")
    for precision in precisions:
        model, task = ours(architecture, precision, method)
        batch = task.collate(encoded(architecture), range(len(LENGTHS)))
        with pooled(model, lambda task=task, batch=batch: task.run(batch)):
            task.backward(batch, batch.units)
        peer = theirs(architecture, precision, model)
        plain_loss(peer, batch, precision).backward()
        found["ours", precision] = gradients(model, model)
        found["theirs", precision] = gradients(peer, model)
    exact = found["theirs", "fp32"]
    error = {key: ((one - exact).norm() / exact.norm()).item() for key, one in found.items()}
    assert error["ours", "fp32"] < 1e-4
    assert 1e-4 < error["theirs", "bf16"] < 0.5
    assert error["ours", "bf16"] <= 1.5 * error["theirs", "bf16"]
