"""The bottleneck adapters' formula, written out, and what of it differs from one method to another."""

import pytest
import torch

from conformance.cases import adapted, shaken, went_in
from deltatune import Houlsby, Parallel, Pfeiffer
from deltatune.errors import UserError
from deltatune.methods import BlockInsert, Site


@pytest.mark.parametrize(
    ("method", "nonlinearity"),
    [
        (Houlsby(reduction=4), lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2),
        (Pfeiffer(reduction=4, scale=0.5), lambda z: z.clamp_min(0)),
        (Parallel(activation="silu"), lambda z: z / (1 + torch.exp(-z))),
    ],
    ids=lambda given: getattr(given, "name", ""),
)
def test_the_output_is_that_of_the_formula(method: BlockInsert, nonlinearity: object) -> None:
    layer = shaken(adapted(method, "linear").double())
    x = torch.randn(6, 12, dtype=torch.float64)
    h = torch.einsum("ti,oi->to", x, layer.base.weight) + layer.base.bias
    read = went_in(x) if method.beside else h
    p = layer.delta
    z = nonlinearity(torch.einsum("td,md->tm", read, p.down) + p.down_bias)
    wanted = h + method.scale * (torch.einsum("tm,dm->td", z, p.up) + p.up_bias)
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        (Houlsby(), 2 * 384 * 24 + 24 + 384),
        (Pfeiffer(), 2 * 384 * 24 + 24 + 384),
        (Parallel(), 2 * 384 * 192 + 192 + 384),
    ],
    ids=["houlsby", "pfeiffer", "parallel"],
)
def test_the_defaults_of_the_papers_on_a_width_of_384(method: BlockInsert, parameters: int) -> None:
    assert method.parameters(Site(384, 1536, role="down")) == parameters


def test_parallel_adapters_start_at_the_base_and_houlsby_s_near_it() -> None:
    site = Site(384, 1536, role="down")
    assert Parallel().start_distance(site) == Houlsby(init="zero-up").start_distance(site) == 0
    assert 0 < Houlsby().start_distance(site) < 0.05


@pytest.mark.parametrize(
    ("options", "why"),
    [({"reduction": 0}, "reduction must be at least 1"), ({"scale": 0.0}, "scale must be a positive number")],
)
def test_impossible_hyperparameters_are_refused(options: dict, why: str) -> None:
    for method in (Houlsby, Pfeiffer, Parallel):
        with pytest.raises(UserError, match=f"{method.name}: {why}"):
            method(**options)
