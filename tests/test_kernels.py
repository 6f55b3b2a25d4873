"""The compiled loops give what their formulas give, whatever the sizes; without a compiler all works as well."""

import os
import platform
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import get_activation
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from deltatune import kernels
from deltatune.dropout import dropout
from deltatune.kernels import build, loops
from deltatune.kernels.build import library
from deltatune.models.gates import gated_silu, replace_gates
from deltatune.models.gelu import GELU, replace_gelu
from deltatune.models.norms import replace_norms
from deltatune.models.rotations import replace_rotations, rotated
from deltatune.training.cross_entropy import cross_entropy_
from deltatune.training.pieces import quicken
from deltatune.weights.codec import codes_of, decode, encode
from deltatune.weights.storage import FORMATS, parse_storage
from tiny import tiny_language_model

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
NEAR = {torch.float32: 1e-6, torch.bfloat16: 8e-3}
"""Of the largest number: bf16 has eight bits, and some results are rounded twice."""

needs_kernels = pytest.mark.skipif(bool(kernels.missing()), reason=kernels.missing())


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul_(3).to(dtype)


def near(found: Tensor, exact: Tensor, times: float = 1) -> None:
    """Whether what was found in some type is what was computed in double."""
    limit = times * NEAR[found.dtype] * float(exact.abs().max())
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=limit)


def doubles(*tensors: Tensor) -> list[Tensor]:
    return [one.detach().double().requires_grad_() for one in tensors]


def formula(function: Callable[..., Tensor], dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradients of some inputs, in double."""
    leaves = doubles(*inputs)
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, dy.double())


def test_they_are_here_where_a_compiler_is() -> None:
    """So nothing below is skipped unseen."""
    assert bool(kernels.missing()) == (shutil.which(os.environ.get("CC") or "cc") is None)


@needs_kernels
@TYPES
@pytest.mark.parametrize("shape", [(1, 2), (3, 16), (5, 37), (40, 576)], ids=str)
def test_norms(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, dy, weight = numbers(*shape, dtype=dtype), numbers(*shape, dtype=dtype, seed=1), numbers(shape[1], dtype=dtype)
    y, scales = kernels.rms_norm(x, weight, 1e-5)
    exact, dx = formula(lambda x: x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double(), dy, x)
    near(y, exact)
    near(kernels.rms_norm_backward(x, weight, scales, dy), dx)


SIZES = [(1, 3, 5, 1), (5, 37, 64, 3), (33, 64, 31, 8), (70, 100, 48, 9), (131, 32, 65, 16)]


@needs_kernels
@TYPES
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize(("tokens", "width", "out", "rank"), SIZES, ids=str)
def test_low_rank_updates(tokens: int, width: int, out: int, rank: int, biased: bool, dtype: torch.dtype) -> None:
    x, dy = numbers(tokens, width, dtype=dtype), numbers(tokens, out, dtype=dtype, seed=1)
    A, B = numbers(rank, width, dtype=torch.float32), numbers(out, rank, dtype=torch.float32, seed=1)
    bias = numbers(out, dtype=dtype, seed=3) if biased else None
    exact, *gradients = formula(
        lambda x, A, B: 0.25 * (x @ A.T) @ B.T + (0 if bias is None else bias.double()), dy, x, A, B
    )
    h, factor = kernels.low_rank(x, A, B, 0.25)
    near(kernels.low_rank_output(h, factor, bias, dtype), exact)
    dh, dA, dB = kernels.low_rank_backward(x, h, dy, factor, 0.25)
    dx = kernels.low_rank_output(dh, A, None, dtype)
    for found, wanted in zip((dx, dA, dB), gradients, strict=True):
        near(found, wanted)


@needs_kernels
@TYPES
@pytest.mark.parametrize(("tokens", "width", "out", "rank"), SIZES, ids=str)
def test_low_rank_updates_with_a_magnitude(tokens: int, width: int, out: int, rank: int, dtype: torch.dtype) -> None:
    """The gradients of m/n ⊙ (Y + B·A·x), given what the magnitude is of."""
    x, dy, Y = (numbers(tokens, size, dtype=dtype, seed=seed) for seed, size in enumerate((width, out, out)))
    A, B = numbers(rank, width, dtype=torch.float32), numbers(out, rank, dtype=torch.float32, seed=1)
    m, n = numbers(out, dtype=torch.float32, seed=2), numbers(out, dtype=torch.float32, seed=3).abs() + 0.5
    Z = (Y.double() + 0.25 * (x.double() @ A.double().T) @ B.double().T).to(dtype)
    found = kernels.low_rank(x, A, B, 0.25)
    dh, dA, dB, dZ, dm = kernels.magnified_low_rank_backward(x, found[0], Z, m, n, dy, found[1], 0.25)
    near(dZ, dy.double() * m.double() / n.double())
    near(dm, (dy.double() * Z.double()).sum(0) / n.double())
    for one, other in zip((dh, dA, dB), kernels.low_rank_backward(x, found[0], dZ, found[1], 0.25), strict=True):
        assert torch.equal(one[:, :rank] if one is dh else one, other[:, :rank] if one is dh else other)


needs_products = pytest.mark.skipif(not kernels.multiplies_pairs(), reason="no processor for products of our own")


@needs_products
@pytest.mark.parametrize("updated", [False, True], ids=["", "updated"])
@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize(
    "sizes", [(7, 32, 32), (23, 96, 224), (103, 64, 1568), (300, 4096, 288), (38, 9248, 96)], ids=str
)
def test_products(sizes: tuple[int, int, int], turned: bool, updated: bool) -> None:
    tokens, width, out = sizes
    x, weight = (numbers(*shape, dtype=torch.bfloat16) for shape in ((tokens, width), (out, width)))
    weight, bias = weight.T.contiguous().T if turned else weight, numbers(out, dtype=torch.bfloat16, seed=1)
    h, factor = numbers(tokens, 8, dtype=torch.float32, seed=2), numbers(5, out, dtype=torch.float32, seed=3)
    assert kernels.multiplies(x, weight)
    exact = x.double() @ weight.double().T + bias.double() + (h[:, :5].double() @ factor.double() if updated else 0)
    found = kernels.product(x, weight, bias, (h, factor) if updated else None)
    near(found, exact, 0.5)  # rounded once
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(kernels.product(x, weight, bias, (h, factor) if updated else None), found)
    finally:
        torch.set_num_threads(threads)
    few = kernels.product(x[3:5], weight, bias, (h[3:5], factor) if updated else None)
    assert torch.equal(few, found[3:5]), "a row is the same whatever stands beside it"
    scales = numbers(width, dtype=torch.float32, seed=4)
    scaled = kernels.product(x, weight, bias, (h, factor) if updated else None, scales)
    near(scaled, exact + (x.double() * (scales.double() - 1)) @ weight.double().T, 3)  # weights are rounded, too


MAGNITUDES = [(7, 32, 32, 1), (23, 96, 224, 8), (103, 64, 1568, 3), (50, 4096, 96, 16), (38, 9248, 96, 7)]


@needs_products
@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize("sizes", MAGNITUDES, ids=str)
def test_products_with_a_magnitude(sizes: tuple[int, int, int, int], turned: bool) -> None:
    """m/n ⊙ (x·Wᵀ + s·x·Aᵀ·Bᵀ), its gradients, and n."""
    tokens, width, out, rank = sizes
    x, dy, weight = (numbers(*shape, dtype=torch.bfloat16) for shape in ((tokens, width), (tokens, out), (out, width)))
    weight = weight.T.contiguous().T if turned else weight
    A, B = numbers(rank, width, dtype=torch.float32, seed=1), numbers(out, rank, dtype=torch.float32, seed=2) / 5
    m = numbers(out, dtype=torch.float32, seed=3)
    W, norms = weight.double(), (weight.double() + 0.5 * B.double() @ A.double()).norm(dim=1)
    exact, dx, dA, dB, dm = formula(lambda x, A, B, m: m / norms * (x @ W.T + 0.5 * (x @ A.T) @ B.T), dy, x, A, B, m)
    squares = W.square().sum(1).float()
    h, factor = kernels.low_rank(x, A, B, 0.5)

    def once(rows: slice) -> kernels.Magnified:
        found = kernels.magnified_product(x[rows], weight, (h[rows], factor), A, m, squares)
        assert found is not None
        return found

    found = once(slice(None))
    near(found.y, exact)
    torch.testing.assert_close(found.scales.double(), m.double() / norms, rtol=1e-3, atol=0)  # A is in bf16 there
    torch.testing.assert_close(found.factor, found.scales * factor)
    dh, *back = kernels.scaled_low_rank_backward(x, h, found, m, dy, 0.5)
    back.append(kernels.product(dy, weight.T, None, (dh, A), found.scales))
    for ours, right in zip(back, (dA, dB, dm, dx), strict=True):
        assert (ours.double() - right).norm() < 4e-3 * right.norm()
    assert torch.equal(once(slice(3, 5)).y, found.y[3:5]), "a row is the same whatever stands beside it"
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert all(torch.equal(one, other) for one, other in zip(once(slice(None)), found, strict=True))
    finally:
        torch.set_num_threads(threads)


@needs_products
def test_what_has_no_norm_is_multiplied_by_its_magnitude_alone_and_one_of_zero_is_said() -> None:
    x, weight = torch.ones(3, 32).bfloat16(), torch.ones(64, 32).bfloat16()
    weight[5] = 0
    A, squares = torch.ones(2, 32), weight.float().square().sum(1)
    update = kernels.low_rank(x, A, torch.zeros(64, 2), 1.0)
    found = kernels.magnified_product(x, weight, update, A, torch.full((64,), 7.0), squares)
    assert found is not None
    assert found.scales[5] == 7
    assert not found.y[:, 5].any()
    assert found.y[:, 6].tolist() == pytest.approx([32 * 7 / 32**0.5] * 3, rel=4e-3)
    for place in (0, 40, 63):
        m = torch.ones(64)
        m[place] = 0
        assert kernels.magnified_product(x, weight, update, A, m, squares) is None


@needs_products
@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize("sizes", [(7, 32, 96), (103, 224, 288), (9, 4128, 64)], ids=str)
@pytest.mark.parametrize("words", ["nf4", "nf4:double=false", "fp4:block=256", "nf3:block=32", "nf2", "int8"])
def test_products_with_codes(words: str, sizes: tuple[int, int, int], turned: bool) -> None:
    (tokens, width, out), storage = sizes, parse_storage(words)
    packed = encode(numbers(out, width, dtype=torch.float32), storage)
    weight = decode(packed, storage, torch.empty(out * width, dtype=torch.bfloat16)).view(out, width)
    weight = weight.T if turned else weight
    outer, inner = weight.shape
    x, bias = numbers(tokens, inner, dtype=torch.bfloat16, seed=1), numbers(outer, dtype=torch.bfloat16, seed=2)
    update = numbers(tokens, 8, dtype=torch.float32, seed=2), numbers(5, outer, dtype=torch.float32, seed=3)
    assert kernels.multiplies_codes(x, out, width)
    coded = kernels.Coded(codes_of(packed, storage), outer, turned)
    scales = numbers(inner, dtype=torch.float32, seed=4)
    for more in ((), (bias,), (bias, update), (bias, update, scales)):
        assert torch.equal(kernels.product(x, coded, *more), kernels.product(x, weight, *more))
    if not turned:
        A, m, squares = (
            numbers(5, inner, dtype=torch.float32),
            numbers(outer, dtype=torch.float32),
            scales.new_ones(outer),
        )
        both = [kernels.magnified_product(x, one, update, A, m, squares) for one in (coded, weight)]
        assert all(torch.equal(one, other) for one, other in zip(*both, strict=True))


@needs_products
def test_products_that_are_not_ours_stay_with_pytorch() -> None:
    x, weight = (numbers(32, 64, dtype=torch.bfloat16) for _ in range(2))
    assert kernels.multiplies(x, weight)
    assert kernels.multiplies(x.to("meta"), weight.to("meta"))
    assert not kernels.multiplies(x[:, :48], weight[:, :48])  # half a register
    assert not kernels.multiplies(x.float(), weight.float())
    assert not kernels.multiplies(x.float(), weight)
    assert not kernels.multiplies(x, weight[::2])


@needs_products
def test_an_update_of_too_many_ranks_is_refused() -> None:
    x, weight = (numbers(32, 32, dtype=torch.bfloat16) for _ in range(2))
    update = numbers(32, 24, dtype=torch.float32), numbers(17, 32, dtype=torch.float32)
    with pytest.raises(ValueError, match="rank 16 at most, not of 17"):
        kernels.product(x, weight, None, update)


@needs_kernels
def test_low_rank_updates_give_the_same_bits_again() -> None:
    x, dy = numbers(300, 70, dtype=torch.bfloat16), numbers(300, 50, dtype=torch.bfloat16, seed=1)
    A, B = numbers(8, 70, dtype=torch.float32), numbers(50, 8, dtype=torch.float32, seed=1)

    def once() -> tuple[Tensor, ...]:
        h, factor = kernels.low_rank(x, A, B, 1.0)
        return h, *kernels.low_rank_backward(x, h, dy, factor, 1.0)

    for one, other in zip(once(), once(), strict=True):
        assert torch.equal(one, other)


@needs_kernels
@TYPES
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("shape", [(1, 2), (3, 16), (5, 37), (41, 576)], ids=str)
def test_scaled_columns(shape: tuple[int, int], biased: bool, dtype: torch.dtype) -> None:
    x, dy = numbers(*shape, dtype=dtype), numbers(*shape, dtype=dtype, seed=1)
    m, n, bias = (numbers(shape[1], dtype=torch.float32, seed=seed) for seed in (2, 4, 3))
    n = n.abs() + 0.5
    exact, dx, dm = formula(lambda x, m: x * m / n.double() + (bias.double() if biased else 0), dy, x, m)
    near(kernels.scale_columns(x, m, n, bias if biased else None), exact)
    for found, wanted in zip(kernels.scale_columns_backward(x, m, n, dy), (dx, dm), strict=True):
        near(found, wanted)


@needs_kernels
@TYPES
@pytest.mark.parametrize("shape", [(1, 2, 1), (6, 16, 8), (37, 41, 5), (192, 576, 17)], ids=str)
def test_norms_of_the_rows_of_an_updated_weight(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    out, width, rank = shape
    weight, A, B = (
        numbers(out, width, dtype=dtype),
        numbers(rank, width, dtype=torch.float32),
        numbers(out, rank, dtype=torch.float32),
    )
    squares = weight.double().square().sum(1)
    exact = (weight.double() + 0.5 * B.double() @ A.double()).norm(dim=1)
    one = kernels.Updated(weight, A, B, 0.5, squares.float())
    none = kernels.Updated(0 * weight[:3], A, 0 * B[:3], 0.5, 0 * squares[:3].float())
    found, ones, again = kernels.updated_norms([one, none, one], none=1.0)
    assert torch.allclose(found.double(), exact, rtol=1e-5)
    assert torch.equal(ones, torch.ones_like(ones))
    assert torch.equal(again, found)
    assert not kernels.updated_norms([none])[0].any()


@needs_kernels
@TYPES
@pytest.mark.parametrize("count", [1, 15, 16, 17, 5000])
def test_gates(count: int, dtype: torch.dtype) -> None:
    gate, up, dy = (numbers(count, dtype=dtype, seed=seed) for seed in range(3))
    exact, dgate, dup = formula(lambda gate, up: F.silu(gate) * up, dy, gate, up)
    near(kernels.gated_silu(gate, up), exact)
    for found, wanted in zip(kernels.gated_silu_backward(gate, up, dy), (dgate, dup), strict=True):
        near(found, wanted)


@needs_kernels
@pytest.mark.parametrize("form", ["none", "tanh"])
@pytest.mark.parametrize("count", [1, 15, 33, 5000])
def test_gelu_of_bf16(count: int, form: str) -> None:
    x, dy = (numbers(count, dtype=torch.bfloat16, seed=seed) for seed in range(2))
    exact, dx = formula(lambda x: F.gelu(x, approximate=form), dy, x)
    near(kernels.gelu(x, form == "tanh"), exact)
    near(kernels.gelu_backward(x, dy, form == "tanh"), dx)


@needs_kernels
@pytest.mark.parametrize("form", ["none", "tanh"])
def test_gelu_is_as_near_as_bf16_tells(form: str) -> None:
    x = torch.linspace(-12, 12, 9001).bfloat16()
    one = torch.ones_like(x)
    exact, slope = formula(lambda x: F.gelu(x, approximate=form), one, x)
    bit = 2.0**-8 * exact.abs()  # half the last
    assert ((kernels.gelu(x, form == "tanh").double() - exact).abs() <= bit + 3e-5 * x.double().abs()).all()
    assert (
        (kernels.gelu_backward(x, one, form == "tanh").double() - slope).abs() <= 2.0**-8 * slope.abs() + 2e-4
    ).all()
    ends = torch.tensor([-1e30, -5.0, 0.0, 1e30, torch.inf, torch.nan]).bfloat16()
    found = kernels.gelu(ends, form == "tanh")
    assert found[:5].tolist() == [0, 0, *ends[2:5].tolist()]
    assert found[5].isnan()


def test_gelu_is_replaced_where_it_is_one_of_the_two() -> None:
    forms = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "quick_gelu": None, "gelu_10": None}
    model = nn.ModuleDict({name: get_activation(name) for name in forms} | {"own": nn.GELU()})
    replace_gelu(model)
    found = {name: one.approximate if isinstance(one, GELU) else None for name, one in model.items()}
    assert found == forms | {"own": "none"}
    x = numbers(50, dtype=torch.float32)
    assert torch.equal(model["gelu"](x), F.gelu(x)), "in fp32 nothing is changed"


@needs_kernels
def test_gates_of_large_numbers() -> None:
    gate = torch.tensor([-1e30, -100.0, -88.0, 0.0, 88.0, 100.0, 1e30])
    torch.testing.assert_close(kernels.gated_silu(gate, torch.ones(7)), F.silu(gate))


@needs_kernels
@TYPES
@pytest.mark.parametrize("half", [4, 16, 24, 32])
def test_rotations(half: int, dtype: torch.dtype) -> None:
    x, dy = (numbers(2, 3, 5, 2 * half, dtype=dtype, seed=seed) for seed in range(2))
    angles = numbers(1, 5, half, dtype=torch.float32).repeat(1, 1, 2)
    cosines, sines = angles.cos().to(dtype), angles.sin().to(dtype)
    exact, dx = formula(lambda x: apply_rotary_pos_emb(x, x, cosines.double(), sines.double())[0], dy, x)
    leaf = x.requires_grad_()
    y = rotated(leaf, cosines, sines)
    y.backward(dy)
    near(y.detach(), exact)
    near(leaf.grad, dx)


def attended(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, kept: Tensor | float = 1.0) -> Tensor:
    """The formula, for tensors of one type."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * 0.3
    weights = (scores if bias is None else scores + bias).softmax(-1)
    return (weights * kept @ value).transpose(1, 2)


def texts(*sizes: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values as layers give them, (texts, tokens, heads, size), with heads before tokens."""
    count, heads, groups, queries, tokens, size = sizes
    shapes = (count, queries, heads, size), (count, tokens, groups, size), (count, tokens, groups, size)
    return [numbers(*shape, dtype=dtype, seed=seed).transpose(1, 2) / 3 for seed, shape in enumerate(shapes)]


@needs_kernels
@TYPES
@pytest.mark.parametrize("sizes", [(4, 2, 5, 5, 3), (6, 2, 70, 70, 64), (2, 1, 1, 77, 16), (3, 3, 45, 90, 40)])
@pytest.mark.parametrize("of", [None, (0, 0, 0, 0), (1, 0, 0, 0), (0, 0, 0, 1), (0, 1, 1, 0)], ids=str)
def test_attention(of: tuple[int, ...] | None, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """Without bias; with one that is the same for all, and with one of each text, each query, each head."""
    heads, groups, queries, tokens, size = sizes
    q, k, v = texts(2, *sizes, dtype=dtype)
    dy, bias = numbers(2, queries, heads, size, dtype=dtype, seed=3), None
    if of is not None:
        every = (2, groups, heads // groups, queries)
        shape = [most if own else 1 for own, most in zip(of, every, strict=True)]
        bias = numbers(*shape, tokens, dtype=dtype, seed=4)
        bias[..., 0] = torch.finfo(dtype).min
    y, tops = kernels.attention(q, k, v, bias, None, kernels.Sees(), 0.3, 0.0, 0)
    added = None if bias is None else bias.double().expand(2, *every[1:], tokens).flatten(1, 2)
    exact = formula(lambda *inputs: attended(*inputs, added), dy, q, k, v)
    found = kernels.attention_backward(q, k, v, bias, None, kernels.Sees(), 0.3, 0.0, 0, dy, tops)
    for ours, right in zip((y, *(one.transpose(1, 2) for one in found)), exact, strict=True):
        near(ours, right, 3)  # sums of sums


@needs_kernels
@TYPES
@pytest.mark.parametrize(
    "sees", [(False, 0), (True, 0), (True, 20), (True, 0, 5), (True, 12, 8), (False, 0, 3)], ids=str
)
def test_attention_of_texts_in_one_row(sees: tuple[bool, int, int], dtype: torch.dtype) -> None:
    bounds = torch.tensor([0, 8, 48, 48, 49, 120], dtype=torch.int32)  # one is empty
    causal, window, shared, *_ = *sees, 0
    q, k, v = texts(1, 4, 2, 120, 120, 24, dtype=dtype)
    dy = numbers(1, 120, 4, 24, dtype=dtype, seed=3)
    row = torch.arange(120)
    text = torch.bucketize(row, bounds[1:-1], right=True)
    place = row - bounds[text] + torch.where(text > 0, shared, 0)  # in its text
    later = place - place[:, None]
    hidden = (text != text[:, None]) & ~(row < shared)
    if causal:
        hidden |= later > 0
    if window:
        hidden |= later <= -window
    bias = torch.zeros(120, 120, dtype=torch.float64).masked_fill_(hidden, -torch.inf)
    exact = formula(lambda *inputs: attended(*inputs, bias), dy, q, k, v)
    y, tops = kernels.attention(q, k, v, None, bounds, kernels.Sees(*sees), 0.3, 0.0, 0)
    found = kernels.attention_backward(q, k, v, None, bounds, kernels.Sees(*sees), 0.3, 0.0, 0, dy, tops)
    for ours, right in zip((y, *(one.transpose(1, 2) for one in found)), exact, strict=True):
        near(ours, right, 3)  # sums of sums


@needs_kernels
@pytest.mark.parametrize("bounds", [[0, 4], [0, 4, 9], [1, 8], [0, 5, 3, 8]], ids=str)
def test_bounds_that_are_none_of_the_row_are_refused(bounds: list[int]) -> None:
    row = texts(1, 2, 1, 8, 8, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match="no bounds of texts that fill a row of 8 tokens"):
        kernels.attention(*row, None, torch.tensor(bounds), kernels.Sees(True), 1.0, 0.0, 0)


@needs_kernels
def test_what_all_texts_share_has_to_stand_in_the_first() -> None:
    row = texts(1, 2, 1, 8, 8, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match="a first text of 3 tokens does not begin with the 4 that all share"):
        kernels.attention(*row, None, torch.tensor([0, 3, 8]), kernels.Sees(True, 0, 4), 1.0, 0.0, 0)


@needs_kernels
def test_a_bias_the_same_for_every_token_is_none() -> None:
    row = texts(1, 2, 1, 8, 8, 4, dtype=torch.float32)
    found = [
        kernels.attention(*row, bias, None, kernels.Sees(), 1.0, 0.0, 0)[0]
        for bias in (None, torch.zeros(1, 1, 1, 1, 1))
    ]
    assert torch.equal(*found)


@needs_kernels
@TYPES
def test_attention_drops_the_same_weights_in_both_directions(dtype: torch.dtype) -> None:
    q, k, v = texts(2, 4, 2, 40, 40, 48, dtype=dtype)
    dy = numbers(2, 40, 4, 48, dtype=dtype, seed=3)
    how = None, None, kernels.Sees(), 0.3, 0.4
    each = torch.eye(40, 48, dtype=dtype).expand(2, 2, -1, -1)  # as values they give the weights themselves
    seen = [kernels.attention(q, k, each, *how, seed)[0].transpose(1, 2)[..., :40] != 0 for seed in (5, 5, 6)]
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert float(seen[0].double().mean()) == pytest.approx(0.6, abs=0.02)
    y, tops = kernels.attention(q, k, v, *how, 5)
    exact = formula(lambda *inputs: attended(*inputs, None, seen[0] / 0.6), dy, q, k, v)
    found = kernels.attention_backward(q, k, v, *how, 5, dy, tops)
    for ours, right in zip((y, *(one.transpose(1, 2) for one in found)), exact, strict=True):
        near(ours, right, 3)  # sums of sums


@needs_kernels
def test_what_is_no_number_stays_none() -> None:
    for dtype in NEAR:
        query, others = torch.zeros(1, 1, 2, 20, dtype=dtype), torch.ones(1, 1, 2, 20, dtype=dtype)
        query[..., 0, 3] = torch.nan
        y, _ = kernels.attention(query, others, others, None, None, kernels.Sees(), 1.0, 0.0, 0)
        assert y[0, 0].isnan().all()
        assert not y[0, 1].isnan().any()
        logits = torch.zeros(2, 20, dtype=dtype)
        logits[0, 3] = torch.nan
        losses = kernels.cross_entropy_(logits, torch.tensor([1, 1]), 1)
        assert losses.isnan().tolist() == [True, False]
        assert logits[0].isnan().all()
        assert not logits[1].isnan().any()


@needs_kernels
@TYPES
def test_a_seed_drops_the_same_again_and_another_something_else(dtype: torch.dtype) -> None:
    x = torch.ones(300, 1001, dtype=dtype)
    once, again, other = (kernels.drop(x, 0.3, seed) for seed in (2**40 + 5, 2**40 + 5, 5))
    assert torch.equal(once, again)
    both = ((once == 0) & (other == 0)).float().mean().item()
    assert both == pytest.approx(0.09, abs=0.005)


@needs_kernels
@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_what_is_dropped_has_no_pattern(seed: int) -> None:
    """Neither along a row nor down a column, nor from one seed to the next."""
    zero = (kernels.drop(torch.ones(2048, 1024), 0.3, seed) == 0).float()
    nearby = (kernels.drop(torch.ones(2048, 1024), 0.3, seed + 1) == 0).float()
    pairs = [(zero[:, :-lag], zero[:, lag:]) for lag in (1, 16, 32)] + [(zero[:-1], zero[1:]), (zero, nearby)]
    for a, b in pairs:
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 0.004  # 6 standard errors
    assert (zero.mean(0) - 0.3).abs().max() < 0.06
    assert (zero.mean(1) - 0.3).abs().max() < 0.09


@needs_kernels
def test_the_same_inputs_give_the_same_bits() -> None:
    x, weight = numbers(999, 577, dtype=torch.bfloat16), numbers(577, dtype=torch.bfloat16)
    first, second = (kernels.rms_norm(x, weight, 1e-5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def step(model: nn.Module, plain: tuple[str, ...]) -> list[Tensor]:
    """The loss and the gradients of a step of a tiny Llama."""
    quicken(model, 64, plain)
    ids = torch.arange(4, 36).view(2, 16)
    model.train().zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@needs_kernels
def test_a_model_with_them_trains_as_without() -> None:
    found = []
    for plain in ((), ("gates", "norms", "rotations", "attention", "dropout")):
        model = tiny_language_model("llama")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" not in name)
        found.append(step(model, plain))
    assert len(found[0]) > 8
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@needs_kernels
def test_what_is_replaced_says_so() -> None:
    """Otherwise the test above compares nothing."""
    model = tiny_language_model("llama").requires_grad_(False)
    for replace in (replace_gates, replace_norms, replace_rotations):
        replace(model)
    changed = [type(module).__name__ for module in model.modules() if "forward" in vars(module)]
    assert changed == ["LlamaAttention", "LlamaMLP"] * 2


def everything(dtype: torch.dtype) -> list[Tensor]:
    """What each operator gives for sizes that fill no whole registers."""
    x, dy, up = (numbers(13, 37, dtype=dtype, seed=seed) for seed in range(3))
    weight, factors = numbers(37, dtype=dtype, seed=3), numbers(37, dtype=torch.float32, seed=4)
    norms = factors.abs() + 0.5
    A, B = numbers(3, 37, dtype=torch.float32), numbers(37, 3, dtype=torch.float32)
    y, scales = kernels.rms_norm(x, weight, 1e-5)
    h, factor = kernels.low_rank(x, A, B, 0.5)
    logits, tokens = x.clone(), [one.view(1, 1, 13, 37) / 10 for one in (x, dy, up)]
    losses = kernels.cross_entropy_(logits, torch.arange(13), 13)
    how = torch.zeros(1, 1, 1, 13, 13, dtype=dtype), None, kernels.Sees(), 1.0, 0.3, 7
    attended, tops = kernels.attention(*tokens, *how)
    passed = kernels.attention_backward(*tokens, *how, dy.view(1, 13, 1, 37), tops)
    return [
        y, kernels.rms_norm_backward(x, weight, scales, dy),
        kernels.gated_silu(x, up), *kernels.gated_silu_backward(x, up, dy),
        *(kernels.gelu(x.bfloat16(), tanh) for tanh in (False, True)),
        *(kernels.gelu_backward(x.bfloat16(), dy.bfloat16(), tanh) for tanh in (False, True)),
        kernels.rotate(x[:, :36].reshape(13, 2, 18), x[:, :18], up[:, :18], False), attended, *passed,
        kernels.low_rank_output(h, factor, weight, dtype), *kernels.low_rank_backward(x, h, dy, factor, 0.5)[1:],
        kernels.scale_columns(x, factors, norms, factors), *kernels.scale_columns_backward(x, factors, norms, dy),
        *kernels.magnified_low_rank_backward(x, h, up, factors, norms, dy, factor, 0.5)[1:],
        *kernels.scaled_low_rank_backward(x, h, kernels.Magnified(up, norms, factor), factors, dy, 0.5)[1:],
        *kernels.updated_norms([kernels.Updated(x, A, B[:13].contiguous(), 0.5, factors[:13].abs())]),
        logits, losses, kernels.drop(x, 0.3, 7),
        *(decode(encode(x, storage), storage, x.new_empty(x.numel())) for storage in map(parse_storage, FORMATS[:5])),
    ]  # fmt: skip


@needs_kernels
@TYPES
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the processors meant are of that kind")
def test_a_processor_without_wide_registers_gives_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    here = everything(dtype)
    flags = tuple(flag.replace("native", "x86-64") for flag in build._FLAGS)
    assert flags != build._FLAGS
    monkeypatch.setattr(build, "_FLAGS", flags)
    monkeypatch.setattr(loops, "library", cache(library.__wrapped__))
    for ours, wider in zip(everything(dtype), here, strict=True):
        near(ours, wider.double())


@pytest.fixture
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    library.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler")
    yield
    library.cache_clear()


@pytest.mark.usefixtures("_no_compiler")
def test_without_a_compiler_everything_has_another_way() -> None:
    assert kernels.missing() == "there is no C compiler here: install gcc"
    assert not kernels.ready(torch.ones(3))
    assert (dropout(torch.ones(1000), 0.5) == 0).any()
    logits = torch.zeros(2, 5)
    assert cross_entropy_(logits, torch.tensor([0, 1]), 2) == pytest.approx(1.6094, abs=1e-4)
    assert len(step(tiny_language_model("llama"), ())) > 8


def test_a_compiler_that_fails_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("DELTATUNE_CACHE", str(tmp_path / "cache"))
    assert library.__wrapped__(16) == f"{broken} could not compile them"
    assert not list((tmp_path / "cache" / "kernels").iterdir())


@needs_kernels
def test_a_folder_that_others_can_write_to_is_not_loaded_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "kernels"
    folder.mkdir()
    folder.chmod(0o777)
    monkeypatch.setenv("DELTATUNE_CACHE", str(tmp_path))
    assert "can be written to by other users" in str(library.__wrapped__(16))
    assert not list(folder.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o500)
    monkeypatch.setenv("DELTATUNE_CACHE", str(tmp_path / "cache"))
    assert "could not be kept or loaded" in library.__wrapped__(16)


@needs_kernels
def test_a_gate_keeps_no_more_than_what_comes_in() -> None:
    gate, up = (numbers(8, dtype=torch.float32, seed=seed).requires_grad_() for seed in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        gated_silu(gate, up)
    assert [one.data_ptr() for one in kept] == [gate.data_ptr(), up.data_ptr()]
