"""Attaching a method leaves an ordinary module that any training loop can use."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import deltatune
from deltatune import Full, Head, LoRA
from deltatune.errors import UserError
from deltatune.models.adapted import AdaptedLinear
from deltatune.models.attach import adapted_layers, trainable_parameters
from deltatune.models.fingerprint import fingerprint
from tiny import tiny_inputs, tiny_model


def test_attaching_returns_the_same_model_of_its_own_class() -> None:
    model = tiny_model("bert")
    attached = deltatune.attach(model, LoRA(rank=2))
    assert attached is model
    assert type(attached).__name__ == "BertForSequenceClassification"


def test_a_plain_loop_trains_only_the_adapter_and_the_head() -> None:
    model = deltatune.attach(tiny_model("gpt2"), LoRA(rank=2, targets="attention"))
    model.config.pad_token_id = 0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    labels = torch.tensor([0, 1, 2])
    losses = []
    for _ in range(30):
        loss = model(**tiny_inputs(), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_the_trainer_of_transformers_works_unchanged(tmp_path: Path) -> None:
    model = deltatune.attach(tiny_model("bert"), LoRA(rank=2))
    inputs = tiny_inputs()
    rows = [
        {**{name: tensor[i % 3] for name, tensor in inputs.items()}, "labels": torch.tensor(i % 3)} for i in range(24)
    ]
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=20, per_device_train_batch_size=6, learning_rate=1e-2, use_cpu=True, report_to=[],
        save_strategy="steps", save_steps=20, logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())
    deltatune.save_adapter(model, tmp_path / "adapter")
    loaded = deltatune.load_adapter(tiny_model("bert"), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)


def test_patterns_give_some_targets_other_ranks_and_alphas() -> None:
    method = LoRA(rank=2, rank_pattern={"mlp": 4, "layer.0.attention.self.query": 3}, alpha_pattern={"query": 7.0})
    layers = adapted_layers(deltatune.attach(tiny_model("bert"), method))
    deltas = {path.removeprefix("bert.encoder.layer."): layer.delta for path, layer in layers.items()}
    assert deltas["0.intermediate.dense"].A.shape == (4, 32)
    assert deltas["0.attention.self.query"].A.shape == (3, 32)
    assert deltas["1.attention.self.query"].A.shape == (2, 32)
    assert deltas["0.attention.self.query"].scale == 7 / 3
    assert deltas["1.attention.self.key"].scale == 2.0, "left out, alpha is twice the rank"
    assert deltas["0.intermediate.dense"].scale == 2.0


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (LoRA(rank=2, rank_pattern={"qurey": 4}), "'qurey' matches no layer"),
        (LoRA(rank=2, targets="query", alpha_pattern={"mlp": 4.0}), "'mlp' matches no layer"),
        (LoRA(rank=33), "query: lora: rank 33 is more than a 32×32 weight has"),
        (LoRA(rank=2, rank_pattern={"mlp": 60}), "dense: lora: rank 60"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_model_is_changed(method: LoRA, why: str) -> None:
    model = tiny_model("bert")
    with pytest.raises(UserError, match=why):
        deltatune.attach(model, method)
    assert not adapted_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_second_adapter_of_the_same_name_is_refused() -> None:
    model = deltatune.attach(tiny_model("bert"), LoRA(rank=2))
    with pytest.raises(UserError, match="an adapter named 'default' is attached already"):
        deltatune.attach(model, LoRA(rank=4))


def test_full_trains_everything_and_head_the_classifier_alone() -> None:
    full = deltatune.attach(tiny_model("bert"), Full())
    assert all(parameter.requires_grad for parameter in full.parameters())
    head = deltatune.attach(tiny_model("bert"), Head())
    assert set(trainable_parameters(head)) == {"classifier.weight", "classifier.bias"}


def test_the_seed_decides_the_initial_values() -> None:
    def first(seed: int) -> torch.Tensor:
        model = deltatune.attach(tiny_model("bert"), LoRA(rank=2), seed=seed)
        return next(iter(adapted_layers(model).values())).delta.A

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_an_adapted_model_can_be_copied_and_moved_between_types() -> None:
    model = deltatune.attach(tiny_model("bert"), LoRA(rank=2))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in adapted_layers(twin).values():
            layer.weight.zero_()
    assert all(layer.weight.abs().sum() > 0 for layer in adapted_layers(model).values()), "the copy has its own weights"
    assert model.bfloat16()(**tiny_inputs()).logits.dtype == torch.bfloat16


def test_a_plain_module_of_ones_own_can_be_adapted() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    deltatune.attach(model, LoRA(rank=2, targets="0"))
    assert isinstance(model[0], AdaptedLinear)
    assert model(torch.randn(3, 8)).shape == (3, 4)
    assert set(trainable_parameters(model)) == {"0.deltas.default.A", "0.deltas.default.B"}


def test_a_fingerprint_tells_bases_apart_but_not_their_types_or_heads() -> None:
    mark = fingerprint(tiny_model("bert"), without=("classifier",))
    assert mark == fingerprint(tiny_model("bert", dtype=torch.bfloat16), without=("classifier",))
    assert mark != fingerprint(tiny_model("bert", seed=1), without=("classifier",))
    changed = tiny_model("bert")
    with torch.no_grad():
        changed.bert.encoder.layer[1].output.dense.weight.mul_(1.1)
    assert mark != fingerprint(changed, without=("classifier",))
