"""Our attention for short texts gives what each architecture's own plain attention gives, and so do its gradients."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import deltatune
from deltatune import Full, Prefix
from deltatune.models import short_attention
from deltatune.models.short_attention import _Attend
from deltatune.training.attention import choose_attention
from tiny import VOCABULARY, tiny_inputs, tiny_language_model, tiny_model

MODELS = {
    **{name: lambda name=name: tiny_model(name) for name in ("bert", "roberta", "distilbert")},
    **{name: lambda name=name: tiny_language_model(name) for name in ("gpt2", "llama", "qwen2", "t5", "bart")},
}


def called(model, inputs: dict) -> torch.Tensor:
    both = {"decoder_input_ids": inputs["input_ids"]} if model.config.is_encoder_decoder else {}
    return model(**inputs, **both).logits


def real(logits: torch.Tensor, inputs: dict) -> torch.Tensor:
    return logits[inputs["attention_mask"].bool()] if logits.ndim == 3 else logits


CASES = [(name, method) for name in MODELS for method in (Full(), Prefix(virtual_tokens=3)) if name != "bart"]


@pytest.mark.parametrize(
    ("name", "method"), [*CASES, ("bart", Full())], ids=lambda value: getattr(value, "name", value)
)
def test_outputs_and_gradients_are_those_of_plain_attention(name: str, method) -> None:
    ours, inputs = deltatune.attach(MODELS[name](), method), tiny_inputs()
    theirs = copy.deepcopy(ours) if method.name == "full" else deltatune.attach(MODELS[name](), method)
    theirs.set_attn_implementation("eager")
    choose_attention(ours, 64)
    assert ours.config._attn_implementation == short_attention.NAME
    generator = torch.Generator().manual_seed(3)
    outputs = [real(called(model, inputs), inputs) for model in (ours, theirs)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)
    weights = torch.randn(outputs[0].shape, generator=generator)
    for output in outputs:
        (output * weights).sum().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert expected
    for name, parameter in ours.named_parameters():
        if name in expected:
            near = 1e-5 * float(expected[name].abs().max())  # some of T5's are 100 and more
            torch.testing.assert_close(parameter.grad, expected[name], atol=max(2e-4, near), rtol=1e-3)


def test_its_backward_is_that_of_the_formula_with_dropout_and_bias() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    keeps = torch.rand(2, 2, 3, 4, 5, generator=generator) > 0.3
    inputs = (draw(2, 2, 12, 3), draw(2, 2, 5, 3), draw(2, 2, 5, 3), draw(1, 2, 3, 4, 5))
    assert torch.autograd.gradcheck(lambda q, k, v, b: _Attend.apply(q, k, v, b, keeps, 0.7, 0.3, 4), inputs)


def test_attention_is_dropped_in_training_at_the_rate_that_the_model_says() -> None:
    model = tiny_model("bert", attention_probs_dropout_prob=0.4, hidden_dropout_prob=0.0)
    choose_attention(model, 64)
    many = {name: value.repeat(400, 1) for name, value in tiny_inputs().items()}  # each row is dropped by itself
    with torch.no_grad():
        still = called(model, tiny_inputs())
        torch.manual_seed(0)
        several = called(model.train(), many).unflatten(0, (400, -1))
    assert several.std(0).max() > 0.05
    plain = copy.deepcopy(model).eval()
    assert torch.equal(called(plain, tiny_inputs()), still)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = called(model, many).unflatten(0, (400, -1))
    error = 5 * several.std(0) / 20
    assert ((several.mean(0) - theirs.mean(0)).abs() < error).all()
    torch.testing.assert_close(several.std(0), theirs.std(0), rtol=0.3, atol=0)


@pytest.mark.parametrize("cap", [0.01, 50.0])
def test_an_architecture_whose_attention_is_another_keeps_its_own(cap: float) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = AutoConfig.for_model(
        "gemma2", vocab_size=VOCABULARY, head_dim=8, num_key_value_heads=2, attn_logit_softcapping=cap,
        query_pre_attn_scalar=1, initializer_range=0.5, **sizes,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    choose_attention(model, 64)
    assert model.config._attn_implementation == "eager"


def test_long_texts_keep_the_fused_kernel() -> None:
    model = tiny_model("bert")
    choose_attention(model, 4096)
    assert model.config._attn_implementation == "sdpa"


def test_what_is_left_of_a_text_is_a_number_under_autocast_too() -> None:
    """Padding on the left sees nothing; its mask is made in fp32 where the model is, and used in bf16."""
    model = tiny_language_model("llama").eval()
    ids = torch.tensor([[0, 0, 0, 5, 6, 7], [8, 9, 10, 11, 12, 13]])
    found = []
    for name, half in (("eager", False), ("eager", True), (short_attention.NAME, True)):
        model.set_attn_implementation(name)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            found.append(model(input_ids=ids, attention_mask=(ids != 0).long()).logits[:, 3:].float())
    exact, theirs, ours = found
    assert torch.isfinite(ours).all()
    assert (ours - exact).norm() < 1.2 * (theirs - exact).norm() < 0.1 * exact.norm()
