"""Where a step goes: every part is found, the products with frozen weights are told from a method's own."""

import pytest
import torch

import deltatune
from deltatune import UserError, kernels
from deltatune.models.base import Base
from deltatune.training.attention import most_tokens
from deltatune.training.doctor import examine_base, examine_machine
from deltatune.training.pieces import PIECES
from deltatune.training.profile import PARTS, Profile, _product_seconds, profile_step
from tiny import tiny_language_model, tiny_model, tokenizer


def profiled(architecture: str, method: str = "lora", *, writes: bool = False, storage: str = "", **options) -> Profile:
    model = tiny_language_model(architecture) if writes else tiny_model(architecture)
    if storage:
        deltatune.quantise(model, storage)
    base = Base(model, tokenizer(architecture), architecture, "")
    return profile_step(base, deltatune.make(method, options), tokens=64, length=16, steps=1)


@pytest.mark.parametrize(("architecture", "writes"), [("bert", False), ("llama", True), ("t5", False)])
def test_the_parts_of_a_step_make_up_the_step(architecture: str, writes: bool) -> None:
    found = profiled(architecture, writes=writes, rank=2)
    assert found.parts.keys() == PARTS.keys()
    assert sum(found.parts.values()) == pytest.approx(found.seconds)
    assert all(seconds > 0 for seconds in found.parts.values())
    assert found.limit > 0
    assert found.reached == found.limit / found.seconds


def made(*pieces: str) -> tuple[str, ...]:
    """These pieces where there is a compiler for them."""
    return () if kernels.missing() else pieces


def test_the_pieces_that_a_step_has_are_named() -> None:
    products = ("products",) if kernels.multiplies_pairs() else ()
    assert profiled("bert", rank=2).pieces == ("attention", "dropout", *made("gelu"), "pooled", *products)
    assert profiled("llama", rank=2, writes=True).pieces == (
        "attention",
        *made("gates", "norms"),
        "packing",
        *products,
        *made("rotations"),
        "sharing",
    )


def test_a_selection_adds_nothing_to_the_layers_and_lora_does() -> None:
    assert profiled("bert", "bitfit").parts["method"] == 0
    assert profiled("bert", rank=2).parts["method"] > 0


def products(monkeypatch, *arguments, **options) -> list[tuple[int, int, int]]:
    seen = []

    def note(product, *rest):
        seen.append(product)
        return _product_seconds(product, *rest)

    monkeypatch.setattr("deltatune.training.profile._product_seconds", note)
    profiled(*arguments, **options)
    return seen


@pytest.mark.parametrize("storage", ["", "nf4"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_limit_is_of_the_frozen_products_forward_and_back_and_of_no_others(
    monkeypatch, method: str, storage: str
) -> None:
    # Blocks of 32 features with 64 inside, a pooler and a head of 3 labels; 4 texts of 16 tokens: as many as inside.
    seen = set(products(monkeypatch, "bert", method, storage=storage, rank=2))
    assert {(64, 32, 32), (64, 32, 64), (64, 64, 32)} <= seen  # attention; both of the feed-forward part, both ways
    assert (4, 32, 32) in seen  # the pooler
    assert not [product for product in seen if 2 in product]


def test_profiling_leaves_what_trains_as_it_was() -> None:
    base = Base(tiny_model("bert"), tokenizer("bert"), "bert", "")
    profile_step(base, deltatune.LoRA(rank=2), tokens=32, length=8, steps=1)
    added = [parameter for name, parameter in base.model.named_parameters() if name.endswith(".B")]
    assert added
    assert not any(parameter.any() for parameter in added)


@pytest.mark.parametrize(
    ("method", "length", "message"),
    [("lora", 128, "no step of 256 tokens in texts of 128"), ("none", 16, "trains nothing here")],
)
def test_a_step_that_cannot_be_is_refused(method: str, length: int, message: str) -> None:
    base = Base(tiny_language_model("llama"), tokenizer("llama"), "llama", "")  # it has 64 positions
    with pytest.raises(UserError, match=message):
        profile_step(base, deltatune.make(method, {}), tokens=256, length=length)


def test_what_is_used_on_this_machine_is_said_with_its_reason() -> None:
    findings = {finding.what: finding for finding in examine_machine()}
    assert findings["threads"].chosen == str(torch.get_num_threads())
    assert findings["precision"].chosen in ("bf16", "fp32")
    assert all(finding.why for finding in findings.values())


def said_of(model, name: str, length: int = 32) -> dict[str, tuple[str, str]]:
    findings = examine_base(Base(model, tokenizer(name), "mine", ""), length)
    return {finding.what.removesuffix(" of mine"): (finding.chosen, finding.why) for finding in findings}


@pytest.mark.parametrize(
    ("name", "fast"),
    [
        ("bert", {"attention", "dropout", "pooled", *made("gelu")}),
        ("distilbert", {"attention", "dropout", *made("gelu")}),
        ("llama", {"attention", "packing", "sharing", *made("gates", "norms", "rotations")}),
        ("t5", {"attention", "dropout", *made("norms")}),
    ],
)
def test_every_fast_piece_is_said_with_its_reason(name: str, fast: set[str]) -> None:
    said = said_of(tiny_model(name) if "bert" in name else tiny_language_model(name), name)
    assert {piece for piece, (chosen, _) in said.items() if chosen in ("fast", "deltatune_short")} == fast
    assert {*said} == {*PIECES}
    assert all(why for _, why in said.values())


def test_texts_that_are_too_long_and_an_attention_that_differs_are_told_apart(monkeypatch) -> None:
    chosen, why = said_of(tiny_model("bert"), "bert", 4096)["attention"]
    assert (chosen, why) == ("sdpa", f"texts have 4096 tokens, and it is for {most_tokens()} at most")
    monkeypatch.setattr("deltatune.training.attention.alike", lambda *_: False)
    chosen, why = said_of(tiny_model("bert"), "bert")["attention"]
    assert chosen == "eager"
    assert "does not give" in why
