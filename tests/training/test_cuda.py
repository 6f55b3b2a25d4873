"""On CUDA a run takes none of the pieces that are made for a CPU, and trains what a CPU trains."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

import deltatune
from deltatune import Base, LoRA
from deltatune import dropout as bits
from deltatune.data.sequences import UNSCORED, Sequences
from deltatune.data.tokens import Tokens
from deltatune.models.norms import RMSNorm
from deltatune.training.optimisers import make_optimiser
from deltatune.training.pieces import quicken
from deltatune.training.precision import prepare
from deltatune.training.tasks import task_for
from tiny import DECODERS, tiny_language_model, tiny_model, tokenizer

CLASSIFIERS = ("bert", "roberta", "distilbert")
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def model_of(architecture: str) -> PreTrainedModel:
    model = tiny_model(architecture, labels=2) if architecture in CLASSIFIERS else tiny_language_model(architecture)
    model.config.pad_token_id = model.config.pad_token_id or 0
    return deltatune.attach(model, LoRA(rank=2, init="gaussian"), seed=0)


@pytest.mark.parametrize("architecture", [*CLASSIFIERS, *DECODERS])
def test_a_model_on_cuda_keeps_its_attention_and_norms(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is one of shapes alone, as is what runs on it."""
    model = model_of(architecture)
    monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
    monkeypatch.setattr(bits, "kept", None)  # random bits of a CPU
    with FakeTensorMode(allow_non_fake_inputs=True):
        model._apply(lambda tensor: torch.empty_like(tensor, device="cuda"))
        prepare(model, "bf16")
        before = model.config._attn_implementation, [type(module) for module in model.modules()]
        quicken(model, 64)
        assert not [module for module in model.modules() if "forward" in vars(module)]
        after = [module for module in model.modules() if type(module) is not bits.Dropout]
        assert model.device.type == "cuda"
        assert model.config._attn_implementation == before[0]
        assert not any(isinstance(module, RMSNorm) for module in after)
        assert len(after) == sum(kind is not nn.Dropout for kind in before[1])
        x = torch.empty(4, 8, device="cuda", dtype=torch.bfloat16)
        assert bits.dropout(x, 0.1).shape == x.shape
        optimiser = make_optimiser("adamw", {"x": nn.Parameter(x)}, {"x": 1.0}, 0.0)
    assert optimiser.defaults["fused"]


@pytest.mark.cuda
@on_cuda
@pytest.mark.parametrize("architecture", [*CLASSIFIERS, *DECODERS])
def test_a_step_on_cuda_has_the_loss_and_gradients_of_a_cpu(architecture: str) -> None:
    cpu = model_of(architecture).eval()
    cuda = copy.deepcopy(cpu).to("cuda")
    rows = [[*range(4, 4 + length)] for length in (3, 9, 12)]
    losses, gradients = [], []
    for model in (cpu, cuda):
        prepare(model, "fp32")
        quicken(model, 64)
        task = task_for(Base(model, tokenizer(architecture), "", ""), "fp32")
        examples = (
            Tokens(tuple({"input_ids": row} for row in rows), (0, 1, 1), 0)
            if architecture in CLASSIFIERS
            else Sequences(tuple(rows), tuple([UNSCORED, *row[1:]] for row in rows), 0)
        )
        batch = task.collate(examples, range(3))
        losses.append(task.backward(batch, batch.units))
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


@pytest.mark.cuda
@on_cuda
@pytest.mark.parametrize("storage", ["", "nf4"])
def test_a_language_model_learns_on_cuda_in_bf16(storage: str) -> None:
    model = model_of("llama").to("cuda")
    if storage:
        deltatune.quantise(deltatune.detach(model), storage)
        deltatune.attach(model, LoRA(rank=2), seed=0)
    prepare(model, "bf16")
    quicken(model, 64)
    task = task_for(Base(model, tokenizer("llama"), "", ""), "bf16")
    row = [*range(4, 20)]
    batch = task.collate(Sequences((row,), ([UNSCORED, *row[1:]],), 0), [0])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = make_optimiser("adamw", trained, dict.fromkeys(trained, 1.0), 0.0)
    losses = []
    for _ in range(20):
        losses.append(task.backward(batch, batch.units))
        for group in optimiser.param_groups:
            group["lr"] = 1e-2
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
