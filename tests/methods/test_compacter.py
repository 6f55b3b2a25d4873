"""Compacter's matrices are the sums of Kronecker products, and every adapter of a model shares their small factors."""

import pytest
import torch

import deltatune
from deltatune import Compacter
from deltatune.errors import UserError
from deltatune.methods import Site
from deltatune.methods.compacter import sum_of_products
from deltatune.models.attach import adapted_layers
from tiny import tiny_model


@pytest.mark.parametrize(("n", "p", "rank", "q"), [(4, 3, 1, 5), (2, 1, 2, 7), (1, 4, 3, 2)])
def test_the_matrix_is_the_sum_of_kronecker_products(n: int, p: int, rank: int, q: int) -> None:
    A, left, right = torch.randn(n, n, n), torch.randn(n, p, rank), torch.randn(n, rank, q)
    wanted = sum(torch.kron(A[i], left[i] @ right[i]) for i in range(n))
    torch.testing.assert_close(sum_of_products(A, left, right), wanted)


def test_the_paper_s_defaults_on_a_width_of_384() -> None:
    site = Site(384, 1536, role="down")
    assert Compacter().parameters(site) == 2 * (384 + 12) + 384 + 12
    assert Compacter().shared_parameters([site] * 12) == 4**3


def test_all_adapters_of_a_model_hold_the_same_small_factors() -> None:
    model = deltatune.attach(tiny_model("bert"), Compacter(reduction=4))
    assert len({layer.delta.shared.A.data_ptr() for layer in adapted_layers(model).values()}) == 1


@pytest.mark.parametrize(
    ("options", "why", "hint"),
    [
        ({"n": 5, "reduction": 8}, "n 5 does not divide the width 32 and the bottleneck's 4", "n that fit: 4, 2, 1"),
        ({"n": 4, "reduction": 5}, "n 4 does not divide the width 32 and the bottleneck's 6", "reductions: 4, 7"),
        ({"n": 4, "reduction": 32}, "n 4 does not divide the width 32 and the bottleneck's 1", "reductions: 8, 7"),
        ({"n": 2, "reduction": 8, "rank": 3}, "rank 3 is more than factors of 2×16 have", "the largest is 2"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_nearest_that_do(options: dict, why: str, hint: str) -> None:
    with pytest.raises(UserError, match=why) as caught:
        deltatune.attach(tiny_model("bert"), Compacter(**options))
    assert hint in caught.value.hint
