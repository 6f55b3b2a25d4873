"""A plan says what a run takes before it starts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plan_speed import measure

import deltatune
from deltatune import METHODS, Split, TextData, Training, UserError, kernels, make
from deltatune.data.batches import Batch
from deltatune.data.sequences import UNSCORED, Sequences
from deltatune.dropout import replace_dropout
from deltatune.models.attach import attach, trainable_parameters
from deltatune.models.base import Base, outline, tasks
from deltatune.models.count import count_on
from deltatune.models.places import Place
from deltatune.models.roles import unchanged
from deltatune.planning.bases import known, planned_base, planned_outline
from deltatune.planning.batches import batch_shapes
from deltatune.planning.foresight import foresee, refuse_unfit
from deltatune.planning.machine import from_json, read_machine, sheets
from deltatune.planning.plan import Plan, Refused, plan, plan_run
from deltatune.planning.rehearsal import BatchShape, rehearse
from deltatune.planning.work import OWN_PRODUCT
from deltatune.training.classification import Classification
from deltatune.training.pieces import quicken
from deltatune.training.pooled import pooled
from deltatune.training.precision import prepare
from deltatune.training.tasks import task_for
from deltatune.weights import dynamic_map
from deltatune.weights.levels import levels
from tiny import tiny_config, tiny_language_model, tiny_model, tokenizer

FITTING = {
    "vblora": {"vector_length": 8, "num_vectors": 8},
    "vera": {"rank": 8},
    "miss": {"rank": 8},
    "waveft": {"coefficients": 20},
    "shira": {"rank": 4},
    "compacter": {"reduction": 8},
    "adapterfusion": {"parts": ({}, {})},
    "select": {"parameters": "attention"},
    "oft": {"block_size": 8},
}


def tiny_base(architecture: str, **options) -> Place:
    config = tiny_config(architecture, num_labels=2, **options).to_dict()
    return Place(
        architecture, architecture, "", config={key: value for key, value in config.items() if value is not None}
    )


@pytest.mark.parametrize("name", known())
def test_a_known_base_has_the_parameters_that_it_is_known_to_have(name: str) -> None:
    place, facts = planned_base(name), known()[name]
    model = planned_outline(place, () if "generation" in tasks(place) else ("no", "yes"))
    counted = model if model.can_generate() else model.base_model
    assert sum(parameter.numel() for parameter in counted.parameters()) + facts.get("pooler", 0) == facts["parameters"]


def test_a_known_base_is_found_without_its_owner_and_a_wrong_one_is_named() -> None:
    assert planned_base("llama-2-70b-hf").id == "meta-llama/Llama-2-70b-hf"
    with pytest.raises(UserError, match="gpt3-large"):
        planned_base("gpt3-large")


@pytest.mark.parametrize(
    ("name", "blocks"), [*((name, 2) for name in METHODS), *((name, 11) for name in ("lora", "houlsby", "prefix"))]
)
def test_planned_parameters_are_the_actual_ones(name: str, blocks: int) -> None:
    place = tiny_base("bert", num_hidden_layers=blocks)
    method = make(name, FITTING.get(name, {}))
    model = outline(place, labels=("no", "yes"))
    counted = count_on(model, method)
    rehearsed = rehearse(model, method, BatchShape(2, 6), "fp32", trained=counted.trainable)
    actual = attach(tiny_model("bert", labels=2, num_hidden_layers=blocks), method)
    assert rehearsed.trained == counted.trainable == sum(p.numel() for p in trainable_parameters(actual).values())


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(("name", "architecture"), [("full", "bert"), ("lora", "llama"), ("last-k", "gpt2")])
def test_few_blocks_stand_for_all(
    name: str, architecture: str, checkpoint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = {"gpt2": "n_layer"}.get(architecture, "num_hidden_layers")
    model = outline(tiny_base(architecture, **{deep: 10}), labels=("no", "yes"))
    method = make(name)
    trained = count_on(model, method).trainable
    few = rehearse(model, method, BatchShape(4, 16), "bf16", trained=trained, checkpoint=checkpoint)
    monkeypatch.setattr("deltatune.planning.rehearsal._CUTS", ())
    every = rehearse(model, method, BatchShape(4, 16), "bf16", trained=trained, checkpoint=checkpoint)
    assert few.step.forward == every.step.forward > 0
    assert few.step.peak == every.step.peak
    assert few.step.work == every.step.work
    assert few.step.calls == every.step.calls
    assert few.scoring.peak == every.scoring.peak
    assert few.frozen == every.frozen


@pytest.mark.parametrize("name", ["full", "lora", "vera", "houlsby"])
def test_what_a_rehearsal_keeps_is_what_autograd_keeps(name: str) -> None:
    """Of a real step every storage that the graph saves is alive when the backward pass begins."""
    method, shape = make(name, FITTING.get(name, {})), BatchShape(8, 32)
    model = attach(tiny_model("bert", labels=2), method)
    prepare(model, "fp32")
    replace_dropout(model)
    model.train()
    counted = count_on(outline(tiny_base("bert"), labels=("no", "yes")), method)
    planned = rehearse(
        outline(tiny_base("bert"), labels=("no", "yes")),
        method,
        shape,
        "fp32",
        trained=counted.trainable,
        plain=["attention"],
    )
    there = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in there:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    ids = torch.randint(4, 20, (shape.examples, shape.length))
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    batch = Batch({"input_ids": ids, "attention_mask": mask}, torch.zeros(8, dtype=torch.long), (0,), 256, 8)
    task = Classification(Base(model, None, "", ""), "fp32")
    with (
        pooled(model, lambda: task.run(batch)) as first,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        logits = task.run(batch)
    assert first
    assert sum(kept.values()) <= planned.step.forward * 1.02
    assert sum(kept.values()) == pytest.approx(planned.step.forward, rel=0.2)
    del logits


def test_a_rehearsal_leaves_nothing_behind() -> None:
    method = make("waveft", FITTING["waveft"])
    model = outline(tiny_base("bert"), labels=("no", "yes"))
    rehearse(model, method, BatchShape(2, 6), "fp32", trained=count_on(model, method).trainable)
    real = attach(tiny_model("bert", labels=2), method)
    assert all(tensor.device.type == "cpu" for tensor in (*real.parameters(), *real.buffers()))
    assert not any(type(tensor).__name__ == "Shape" for tensor in (*real.parameters(), *real.buffers()))
    assert model.training or not hasattr(model, "attachment")


def test_every_method_of_a_large_base_is_planned_for_a_machine_that_is_not_there() -> None:
    found = plan("huggyllama/llama-7b", ["lora", "full"], storage="", tokens=512, length=512, machine="rtx4090")
    lora, full = (one for one in found if isinstance(one, Plan))
    assert lora.fits
    assert not full.fits
    assert full.memory.peak > 16 * full.counted.trainable
    assert lora.flops == pytest.approx(4 / 6 * full.flops, rel=0.05)
    quantised = plan("huggyllama/llama-7b", "lora", storage="nf4", tokens=512, length=512, machine="rtx4090")
    assert isinstance(quantised[0], Plan)
    assert quantised[0].memory.weights < 0.35 * lora.memory.weights


def test_a_method_that_does_not_fit_says_why_among_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltatune.planning.plan.METHODS", {"head": METHODS["head"], "lora": METHODS["lora"]})
    head, lora = plan("smollm2-135m", tokens=64, length=16, machine="t4")
    assert isinstance(head, Refused)
    assert "no head" in head.reason
    assert isinstance(lora, Plan)
    with pytest.raises(UserError, match="no head"):
        plan("smollm2-135m", "head", tokens=64, length=16, machine="t4")


@pytest.mark.parametrize("name", sheets())
def test_a_sheet_names_its_source(name: str) -> None:
    machine = read_machine(name)
    assert machine.source
    assert machine.memory > 2**33


def test_a_machine_can_be_written_and_read_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    machine = read_machine("l4")
    assert from_json(json.loads(json.dumps(machine.as_json()))) == machine
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(UserError, match="describes no machine"):
        read_machine(str(tmp_path / "mine.json"))
    with pytest.raises(UserError, match="h200"):
        read_machine("h200")


def test_a_run_that_cannot_fit_is_refused_with_settings_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    data = deltatune.load_data("rotten-tomatoes").limited(train=40, validation=20, test=20, seed=0)
    place = planned_base("minilm")
    settings = Training(batch_tokens=4096)
    roomy = foresee(place, data, make("full"), settings)
    refuse_unfit(roomy)
    tight = replace(roomy.machine, memory=int(0.97 * roomy.plan.memory.peak))
    with pytest.raises(UserError, match="would take") as refused:
        refuse_unfit(foresee(place, data, make("full"), settings, machine=tight))
    assert "--force" in refused.value.hint
    assert "these would fit" in refused.value.hint


@pytest.mark.parametrize("storage", ["", "nf4"])
@pytest.mark.parametrize("name", ["lora", "dora"])
def test_products_of_our_own_count_as_products(name: str, storage: str) -> None:
    for tables in (levels, dynamic_map.levels):  # as in a process that has not decoded anything
        tables.cache_clear()
    model, method = outline(tiny_base("bert"), labels=("no", "yes"), storage=storage), make(name, {"rank": 2})
    trained = count_on(model, method).trainable
    found = [
        rehearse(model, method, BatchShape(4, 16), "bf16", trained=trained, plain=plain).step
        for plain in ((), ("products",))
    ]
    assert 0 < found[0].flops <= found[1].flops
    assert name == "dora" or found[0].flops == found[1].flops, "its norms can be a product of their own"
    ours = [{work.name for work in traced.work if work.name == OWN_PRODUCT} for traced in found]
    assert [bool(names) for names in ours] == [kernels.multiplies_pairs(), False]


def test_each_further_size_of_a_batch_costs_a_kernel_for_every_product() -> None:
    machine = replace(read_machine("l4"), kernel=10**6, making=0.5)

    def planned(*lengths: int) -> Plan:
        split = Split([" ".join(["good"] * length) for length in lengths for _ in range(16)], [0, 1] * 8 * len(lengths))
        data = TextData("made", "", ("bad", "good"), split, split, split, ("text",), "label", "made up")
        return plan_run("minilm", data, make("lora"), Training(batch_tokens=128), machine=machine)

    one, two, alike = planned(6), planned(6, 22), planned(6, 14, 30)  # 128 tokens; 120 and 96; 128 in three ways
    products = one.making_seconds / 0.5
    assert products > 5
    assert (two.making_seconds, alike.making_seconds) == (2 * one.making_seconds, one.making_seconds)
    assert one.memory.kernels == 0
    assert two.memory.kernels >= 10**6 * products
    assert two.seconds > two.making_seconds


def test_every_method_of_a_large_base_is_planned_in_seconds_and_little_memory() -> None:
    found = measure("meta-llama/Llama-2-70b-hf")
    assert found["methods"] >= 20
    assert found["seconds"][0] < 20, "five times what it takes on a quiet core"
    assert found["peak"] < 2**30


@pytest.mark.parametrize(
    ("name", "options"),
    [("vera", {"rank": 8}), ("vblora", FITTING["vblora"]), ("last-k", {"k": 3}), ("houlsby", {"leave_out": (1,)}),
     ("lora", {"targets": r"layer\.[2-5]\..*query"}), ("lora", {"rank_pattern": {r"layer\.3\..*query": 4}}),
     ("prefix", {"projection": True}), ("select", {"parameters": "biases"}), ("oft", FITTING["oft"])],
    ids=lambda given: given if isinstance(given, str) else "+".join(given),
)  # fmt: skip
def test_planned_parameters_are_the_actual_ones_whichever_blocks_a_method_is_in(name: str, options: dict) -> None:
    """Also where the blocks of a base are not alike, so that none stands for another."""
    method = make(name, options)
    model = outline(tiny_base("bert", num_hidden_layers=9), labels=("no", "yes"))
    with unchanged(model):
        counted = count_on(model, method)
    rehearsed = rehearse(model, method, BatchShape(2, 6), "fp32", trained=counted.trainable)
    actual = attach(tiny_model("bert", labels=2, num_hidden_layers=9), method)
    trained = trainable_parameters(actual).values()
    assert rehearsed.trained == counted.trainable == sum(parameter.numel() for parameter in trained)
    held = {id(tensor): tensor for tensor in (*actual.parameters(), *actual.buffers())}.values()
    assert rehearsed.frozen == sum(tensor.nbytes for tensor in held) - 4 * counted.trainable


@pytest.mark.parametrize("plain", [(), ("sharing",), ("packing",)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}])
def test_a_batch_is_planned_with_the_tokens_that_its_row_has(options: dict, training: bool, plain: tuple) -> None:
    rows = tuple([5, 6, 7, *range(8, 8 + length)] for length in (9, 14, 30, 21))
    examples = Sequences(rows, tuple([*[UNSCORED] * 5, *row[5:]] for row in rows), 0)
    model, method = tiny_language_model("llama"), make("lora", options)
    [shape] = batch_shapes(examples, [range(4)], model, method, Training(plain=plain), 8, training=training)
    deltatune.attach(model, method)
    model.config.pad_token_id = 0
    quicken(model, 64)
    task = task_for(Base(model.train(training), tokenizer("llama"), "", ""), "fp32", plain)
    seen = []
    model.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs["input_ids"].numel()), with_kwargs=True)
    task.backward(task.collate(examples, range(4)), 1)
    assert shape.examples == 4
    assert 0 <= seen[-1] - shape.tokens < 32 + (0 if kernels.wide() else 4 * 7)
