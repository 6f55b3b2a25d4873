"""VeRA: the paper's counts, random matrices that are PEFT's bit for bit, PEFT's adapters, and what is refused."""

from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import deltatune
from conformance.cases import shaken
from deltatune import VeRA
from deltatune.errors import UserError
from deltatune.methods import Site
from deltatune.models.adapted import AdaptedLinear
from deltatune.models.adapters import TENSORS
from deltatune.models.attach import adapted_layers, attachment
from tiny import tiny_inputs, tiny_model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_inputs()).logits


def peft_model(architecture: str, targets: list[str], **options) -> peft.PeftModel:
    config = peft.VeraConfig(task_type="SEQ_CLS", target_modules=targets, **{"r": 16, **options})
    return shaken(peft.get_peft_model(tiny_model(architecture), config)).eval()


@pytest.mark.parametrize(
    ("architecture", "targets", "options"),
    [
        ("bert", ["query", "value"], {"r": 70, "projection_prng_key": 5, "vera_dropout": 0.1}),
        ("roberta", ["query", "output.dense"], {"save_projection": False, "projection_prng_key": 11}),
        ("distilbert", ["q_lin", "lin1"], {"save_projection": False}),
        ("gpt2", ["c_attn", "c_proj"], {"fan_in_fan_out": True, "d_initial": 0.2}),
        ("llama", ["k_proj", "down_proj"], {"save_projection": False}),
        ("t5", ["q", "wo"], {}),
    ],
)
def test_an_adapter_that_peft_made_gives_its_logits_here(
    architecture: str, targets: list[str], options: dict, tmp_path: Path
) -> None:
    theirs = peft_model(architecture, targets, **options)
    theirs.save_pretrained(tmp_path)
    ours = deltatune.load_adapter(tiny_model(architecture), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)


def test_the_random_matrices_are_peft_s_bit_for_bit() -> None:
    theirs = peft_model("bert", ["query", "output.dense"], projection_prng_key=7).base_model
    method = VeRA(rank=16, projection_seed=7, targets=("query", r".*output\.dense"))
    [part] = attachment(deltatune.attach(tiny_model("bert"), method, seed=99)).parts
    ours = part.shared
    assert torch.equal(ours.A, theirs.vera_A["default"])
    assert torch.equal(ours.B, theirs.vera_B["default"])


def test_the_random_matrices_are_left_out_of_the_file_only_on_request(tmp_path: Path) -> None:
    for kept in (True, False):
        method = VeRA(rank=16, save_projection=kept)
        model = deltatune.attach(tiny_model("bert"), method)
        deltatune.save_adapter(model, tmp_path / "adapter")
        tensors = {name: t for name, t in load_file(tmp_path / "adapter" / TENSORS).items() if "vera_" in name}
        assert ("base_model.vera_A" in tensors) == ("base_model.vera_B" in tensors) == kept
        stated = method.stored_parameters([layer.site for layer in adapted_layers(model).values()])
        assert sum(tensor.numel() for tensor in tensors.values()) == stated


def test_every_layer_scales_the_first_rows_and_columns_of_one_frozen_pair() -> None:
    model = deltatune.attach(tiny_model("bert"), VeRA(rank=16))
    [part] = attachment(model).parts
    shared = part.shared
    assert (shared.A.shape, shared.B.shape) == ((16, 64), (64, 16))
    assert not list(shared.parameters())
    for layer in adapted_layers(model).values():
        assert torch.equal(layer.delta.A, shared.A[:, : layer.in_features])
        assert torch.equal(layer.delta.B, shared.B[: layer.out_features])


def test_it_trains_an_output_and_a_rank_vector_a_layer() -> None:
    """Table 1 of the paper counts L·(d_model + r): rank 256 on query and value of GPT-3 is 2·96·(12,288 + 256)."""
    gpt3 = [Site(12_288, 12_288, role=role) for _ in range(96) for role in ("query", "value")]
    assert sum(VeRA(rank=256).parameters(site) for site in gpt3) == 2 * 96 * (12_288 + 256)


@pytest.mark.parametrize("tokens", [2, 10, 40], ids=["by products", "one of them", "through the merged weight"])
def test_both_ways_to_the_output_and_to_the_input_s_gradient_are_that_of_the_equation(tokens: int) -> None:
    base, site = nn.Linear(12, 20).double().requires_grad_(False), Site(20, 12)
    method, generator = VeRA(rank=7), torch.Generator().manual_seed(0)
    layer = AdaptedLinear(base, site)
    layer.add("default", method.delta(site, layer.frozen, method.share([site], generator), generator).double())
    delta = shaken(layer).delta
    x = torch.randn(tokens, 12, dtype=torch.float64, generator=generator, requires_grad=True)
    outward = torch.randn(tokens, 20, dtype=torch.float64, generator=generator)
    equation = base(x) + delta.lambda_b * F.linear(delta.lambda_d * F.linear(x, delta.A), delta.B)
    wanted = (x, delta.lambda_b, delta.lambda_d)
    torch.testing.assert_close(layer(x), equation)
    torch.testing.assert_close(
        torch.autograd.grad(layer(x), wanted, outward), torch.autograd.grad(equation, wanted, outward)
    )


def test_it_starts_as_the_paper_has_it() -> None:
    delta = next(iter(adapted_layers(deltatune.attach(tiny_model("bert"), VeRA())).values())).delta
    assert delta.lambda_d.shape == (256,)
    assert (delta.lambda_d == 0.1).all()
    assert (delta.lambda_b == 0).all()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"d_initial": 0.0}, "d_initial must be a positive number"),
        ({"projection_seed": -1}, "projection_seed must be"),
        ({"dropout": 1.0}, "dropout must be"),
    ],
)
def test_impossible_hyperparameters_are_refused(options: dict, why: str) -> None:
    with pytest.raises(UserError, match=why):
        VeRA(**options)


def test_trained_biases_of_peft_are_refused(tmp_path: Path) -> None:
    peft_model("bert", ["query"], bias="vera_only").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="bias='vera_only'"):
        deltatune.load_adapter(tiny_model("bert"), tmp_path)
