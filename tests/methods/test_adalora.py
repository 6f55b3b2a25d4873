"""AdaLoRA against PEFT: the same steps, masks and files; and the budget that a run really ends with."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import deltatune
from conformance.cases import shaken
from deltatune import AdaLoRA, Split, TextData, Training
from deltatune.errors import UserError
from deltatune.methods import Site
from deltatune.models.adapters import CONFIG, TENSORS
from deltatune.models.attach import adapted_layers
from deltatune.training.events import Evaluated
from deltatune.weights import weight_of
from tiny import save_tiny, tiny_inputs, tiny_model

LABELS = torch.tensor([0, 1, 2])
quiet = pytest.mark.filterwarnings(
    "ignore:.*LoRA tensor.* invalid shape",  # PEFT on layers that its AdaLoRA pruned to nothing
    "ignore:Initializing zero-element tensors",
    "ignore:The following rank_pattern keys",  # PEFT on the keys that its AdaLoRA writes
)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_inputs()).logits


def fresh(method: AdaLoRA, out: int, in_: int) -> nn.Module:
    """A delta over a layer of that shape, before training."""
    return method.delta(Site(out, in_), weight_of(nn.Linear(in_, out)), None, torch.Generator().manual_seed(0))


def theirs_on(architecture: str = "bert", **options) -> peft.PeftModel:
    """PEFT's AdaLoRA on the tiny base."""
    plain = {"init_r": 6, "target_r": 3, "total_step": 10, "target_modules": ["query", "value"]}
    return peft.get_peft_model(
        tiny_model(architecture), peft.AdaLoraConfig(task_type="SEQ_CLS", **{**plain, **options})
    )


def pruned(architecture: str = "bert", kept: int = 7, **options) -> peft.PeftModel:
    """PEFT's AdaLoRA with random values, pruned to `kept` triplets in all."""
    model = shaken(theirs_on(architecture, **options))
    allocator = model.base_model.rankallocator
    model.train()(**tiny_inputs(), labels=LABELS).loss.backward()
    allocator.update_ipt(model.base_model.model)
    model.peft_config["default"].rank_pattern = allocator.mask_to_budget(model.base_model.model, kept)
    return model.eval()


def test_steps_masks_and_values_are_those_of_peft() -> None:
    """Twelve steps of both from the same start: penalty, sensitivities, schedule and pruning."""
    options = {"init_r": 6, "target_r": 3, "deltaT": 2, "beta1": 0.8, "beta2": 0.7, "orth_reg_weight": 0.3}
    torch.manual_seed(0)  # PEFT draws its values from it
    theirs = theirs_on(**options, tinit=3, tfinal=3, total_step=12, lora_alpha=9)
    method = AdaLoRA(
        init_r=6, target_r=3, delta_t=2, beta1=0.8, beta2=0.7, orth_reg_weight=0.3, tinit=0.25, tfinal=0.25, alpha=9,
        targets=("query", "value"),
    )  # fmt: skip
    ours = deltatune.attach(tiny_model("bert"), method)
    layers = adapted_layers(ours)
    pairs = [(theirs.get_submodule(f"base_model.model.{path}"), layer.delta) for path, layer in layers.items()]
    with torch.no_grad():
        for layer, delta in pairs:
            delta.A.copy_(layer.lora_A["default"])
            delta.B.copy_(layer.lora_B["default"])
        head = dict(theirs.base_model.model.classifier.modules_to_save["default"].named_parameters())
    optimizers = [
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, momentum=0.5)
        for model in (theirs, ours)
    ]
    counts = []
    for step in range(1, 13):
        loss = theirs(**tiny_inputs(step), labels=LABELS).loss
        loss.backward()
        mine = ours(**tiny_inputs(step), labels=LABELS).loss + deltatune.penalty(ours)
        mine.backward()
        torch.testing.assert_close(mine, loss)
        for optimizer in optimizers:
            optimizer.step()
        theirs.base_model.update_and_allocate(step)
        deltatune.after_step(ours, step, 12)
        for optimizer in optimizers:
            optimizer.zero_grad()
        for layer, delta in pairs:
            torch.testing.assert_close(delta.Lambda[:, None], layer.lora_E["default"], atol=1e-5, rtol=1e-3)
            torch.testing.assert_close(delta.A, layer.lora_A["default"], atol=1e-5, rtol=1e-3)
            torch.testing.assert_close(delta.B, layer.lora_B["default"], atol=1e-5, rtol=1e-3)
            assert torch.equal(delta.Lambda == 0, layer.lora_E["default"][:, 0] == 0)
        counts.append(sum(int((delta.Lambda != 0).sum()) for _, delta in pairs))
    pattern = theirs.peft_config["default"].rank_pattern
    assert {key.partition(".lora_E")[0]: kept for key, kept in pattern.items()} == {
        path: layer.delta.kept.tolist() for path, layer in layers.items()
    }
    assert counts[:3] == [24, 24, 24]
    assert counts[8:] == [12, 12, 12, 12]
    assert len({int(delta.kept.sum()) for _, delta in pairs}) > 1, "the layers differ in what they keep"
    for name, parameter in ours.classifier.named_parameters():
        torch.testing.assert_close(parameter, head[name], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(("tinit", "tfinal", "steps"), [(0, 0, 40), (5, 10, 40), (1, 38, 40), (300, 500, 1000)])
def test_the_budget_falls_as_that_of_peft(tinit: int, tfinal: int, steps: int) -> None:
    model = theirs_on(tinit=tinit, tfinal=tfinal, total_step=steps)
    method = AdaLoRA(init_r=6, target_r=3, tinit=tinit / steps, tfinal=tfinal / steps)
    for step in range(1, steps + 1):
        assert method.budget(step, steps, 24, 12) == model.base_model.rankallocator.budget_schedule(step)[0]


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("schedule", [{}, {"tinit": 0.0, "tfinal": 0.0}, {"tinit": 0.49, "tfinal": 0.5, "delta_t": 20}])
def test_a_run_of_any_length_ends_at_the_target(steps: int, schedule: dict) -> None:
    method = AdaLoRA(init_r=5, target_r=2, targets="query", **schedule)
    deltas = {str(i): fresh(method, 8, 8) for i in range(3)}
    for step in range(1, steps + 1):
        for delta in shaken(nn.ModuleDict(deltas), seed=step).values():
            for parameter in delta.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        method.after_step(deltas, step, steps)
        left = sum(int((delta.Lambda != 0).sum()) for delta in deltas.values())
        assert not method.settled(step, steps) or left == 6
    assert method.settled(steps, steps)
    assert left == 6


def test_a_layer_that_no_example_went_through_is_pruned_first() -> None:
    method = AdaLoRA(init_r=3, target_r=2)
    used, unused = fresh(method, 8, 8), fresh(method, 8, 8)
    for parameter in shaken(used).parameters():
        parameter.grad = torch.ones_like(parameter)
    method.after_step({"used": used, "unused": shaken(unused)}, 1, 1)
    assert used.kept.tolist() == [True, True, True]
    assert int(unused.kept.sum()) == 1


def test_the_penalty_is_that_of_the_plain_formula() -> None:
    model = shaken(deltatune.attach(tiny_model("bert"), AdaLoRA(init_r=4, target_r=4, orth_reg_weight=0.25)))
    deltas = [layer.delta for layer in adapted_layers(model).values()]
    norms = [torch.norm(d.A @ d.A.T - torch.eye(4)) for d in deltas]
    norms += [torch.norm(d.B.T @ d.B - torch.eye(4)) for d in deltas]
    torch.testing.assert_close(deltatune.penalty(model), 0.25 * sum(norms) / len(norms))
    assert deltatune.penalty(deltatune.attach(tiny_model("bert"), AdaLoRA(orth_reg_weight=0))) is None


def test_a_run_ends_within_its_budget_although_its_best_weights_are_kept(tmp_path: Path) -> None:
    base = deltatune.load(str(save_tiny(tmp_path / "base", "bert")), labels=("bad", "good"))
    reviews = Split(["a good film", "a bad film", "the plot is great", "the plot is dull"] * 8, [1, 0, 1, 0] * 8)
    data = TextData("reviews", "", ("bad", "good"), reviews, reviews, reviews, ("text",), "label", "made up")
    method = AdaLoRA(init_r=6, target_r=2)
    validations: list[Evaluated] = []
    tuned = deltatune.tune(
        base, data, method,
        Training(epochs=2, evaluations=4, batch_tokens=32, precision="fp32", keep="best", learning_rate=0.05),
        seed=0, listen=lambda event: validations.append(event) if isinstance(event, Evaluated) else None,
    )  # fmt: skip
    steps = [event.step for event in validations if method.settled(event.step, tuned.finished.steps)]
    assert 0 < len(steps) < len(validations)
    assert tuned.finished.best_step in steps
    deltas = [layer.delta for layer in adapted_layers(tuned.base.model).values()]
    assert sum(int((delta.Lambda != 0).sum()) for delta in deltas) == 2 * len(deltas)
    deltatune.save_adapter(tuned.base.model, tmp_path / "adapter")
    plain = deltatune.load(str(tmp_path / "base"), labels=("bad", "good")).model
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(theirs), logits(tuned.base.model.eval()), atol=1e-5, rtol=1e-5)


@quiet
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("bert", {"lora_alpha": 5, "lora_dropout": 0.1}),
        ("bert", {"target_modules": "all-linear", "init_r": 3, "target_r": 1}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("llama", {"target_modules": ["q_proj", "down_proj"]}),
        ("t5", {"target_modules": ["q", "wo"]}),
    ],
)
@pytest.mark.parametrize("make", [lambda *a, **k: shaken(theirs_on(*a, **k)), pruned], ids=["whole", "pruned"])
def test_an_adapter_that_peft_made_gives_its_logits_here(
    make, architecture: str, options: dict, tmp_path: Path
) -> None:
    theirs = make(architecture, **options).eval()
    theirs.save_pretrained(tmp_path)
    ours = deltatune.load_adapter(tiny_model(architecture), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)


@quiet
def test_a_pruned_adapter_of_peft_goes_back_and_forth_even_with_layers_that_lost_all(tmp_path: Path) -> None:
    pruned(kept=2).save_pretrained(tmp_path / "theirs")
    ranks = {key: len(rows) for key, rows in load_file(tmp_path / "theirs" / TENSORS).items() if "lora_E" in key}
    assert sum(ranks.values()) == 2
    assert 0 in ranks.values()
    ours = deltatune.load_adapter(tiny_model("bert"), tmp_path / "theirs")
    deltatune.save_adapter(ours, tmp_path / "ours")
    assert torch.equal(logits(deltatune.load_adapter(tiny_model("bert"), tmp_path / "ours")), logits(ours))
    theirs = peft.PeftModel.from_pretrained(tiny_model("bert"), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-5, rtol=1e-5)
    deltatune.merge(ours)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)
    deltatune.unmerge(ours)
    ours.train()(**tiny_inputs(), labels=LABELS).loss.backward()
    deltatune.penalty(ours).backward()
    deltatune.after_step(ours, 1, 1)
    assert sum(int((layer.delta.Lambda != 0).sum()) for layer in adapted_layers(ours).values()) == 2


def test_the_schedule_goes_to_peft_and_back(tmp_path: Path) -> None:
    method = AdaLoRA(tinit=0.125, tfinal=0.3, delta_t=7, beta1=0.5, beta2=0.6, orth_reg_weight=0.1, targets=("query",))
    deltatune.save_adapter(deltatune.attach(tiny_model("bert"), method), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["tinit"], config["tfinal"], config["total_step"], config["deltaT"]) == (125, 300, 1000, 7)
    again = AdaLoRA.from_peft(config)
    assert (again.tinit, again.tfinal, again.delta_t) == (0.125, 0.3, 7)
    assert (again.beta1, again.beta2, again.orth_reg_weight, again.scale) == (0.5, 0.6, 0.1, method.scale)


def test_the_defaults_are_the_usual_ones() -> None:
    method = AdaLoRA()
    assert (method.init_r, method.target_r, method.beta1, method.beta2) == (12, 8, 0.85, 0.85)
    assert method.parameters(Site(768, 3072)) == 12 * (768 + 3072 + 1)
    delta = fresh(method, 768, 3072)
    assert not delta.Lambda.any()
    assert delta.A.std().item() == pytest.approx(0.02, rel=0.05)
    assert delta.B.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("options", "why", "hint"),
    [
        ({"init_r": 4, "target_r": 5}, "target_r 5 is more than init_r 4", "1 to 4"),
        ({"init_r": 0}, "init_r must be at least 1", ""),
        ({"tinit": 0.5, "tfinal": 0.5}, "leave no step to prune in", "below 1"),
        ({"tinit": 200}, "tinit must be at least 0 and below 1, not 200", ""),
        ({"beta1": 1.0}, "beta1 must be", ""),
        ({"delta_t": 0}, "delta_t must be at least 1", ""),
        ({"orth_reg_weight": -1.0}, "orth_reg_weight must be", ""),
        ({"alpha": 0.0}, "alpha must be a positive number", ""),
        ({"rank_pattern": {"query": 13}}, "rank 13", "0 to 12"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(options: dict, why: str, hint: str) -> None:
    with pytest.raises(UserError, match=why) as caught:
        AdaLoRA(**options)
    assert hint in (caught.value.hint or "")


def test_more_triplets_than_a_layer_can_use_are_refused() -> None:
    with pytest.raises(UserError, match="rank 40 is more than a 32×32 weight has") as caught:
        deltatune.attach(tiny_model("bert"), AdaLoRA(init_r=40))
    assert caught.value.hint == "the largest is 32"
