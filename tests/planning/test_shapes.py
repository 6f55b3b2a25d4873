"""Operators run on shapes alone, those that the planner has never heard of as well."""

from collections.abc import Iterator

import pytest
import torch

from deltatune.planning.machine import read_machine
from deltatune.planning.shapes import Shape
from deltatune.planning.tracing import Trace
from deltatune.planning.work import Work

SIZE = 4 * 6 * 8
"""Bytes of a float32 tensor of 6 × 8."""


@pytest.fixture(scope="module", autouse=True)
def operators() -> Iterator[None]:
    """Operators of somebody's own; each would fail on anything that has numbers."""

    def doubled(x: torch.Tensor) -> torch.Tensor:
        assert x.is_meta
        return torch.empty_like(x)

    def halved(x: torch.Tensor) -> None:
        raise AssertionError("it gives nothing, so it need not run")

    def summed(x: torch.Tensor) -> torch.Tensor:
        assert x.is_meta
        return x.new_empty(len(x))

    library = torch.library.Library("deltatune_unheard", "DEF")
    for schema, function in (
        ("doubled(Tensor x) -> Tensor", doubled),
        ("halved(Tensor(a!) x) -> ()", halved),
        ("summed_(Tensor(a!) x) -> Tensor", summed),
    ):
        library.define(schema)
        library.impl(schema.partition("(")[0], function, "CompositeExplicitAutograd")
    yield
    library._destroy()


def ran(name: str, times: int = 1) -> tuple[torch.Tensor | None, Trace]:
    with Trace() as trace:
        x = torch.empty(6, 8)
        for _ in range(times):
            out = getattr(torch.ops.deltatune_unheard, name)(x)
    return out, trace


@pytest.mark.parametrize(
    ("name", "written", "moved"),
    [("doubled", SIZE, 2 * SIZE), ("halved", 0, 2 * SIZE), ("summed_", 4 * 6, 2 * SIZE + 4 * 6)],
)
def test_an_operator_that_is_unheard_of_is_known_by_its_bytes(name: str, written: int, moved: int) -> None:
    out, trace = ran(name, times=3)  # the first time worked out, then remembered
    work = Work(f"deltatune_unheard::{name}", torch.float32, (48,), moved)
    assert trace.traced.work == {work: 3}
    assert trace.traced.peak == SIZE + written * (2 if written else 0)  # while the next is made the last is there
    assert isinstance(out, Shape) is bool(written)


def test_an_operator_that_is_unheard_of_takes_as_long_as_moving_its_bytes() -> None:
    machine = read_machine("l4")
    _, trace = ran("doubled")
    (work,) = trace.traced.work
    assert machine.of(work) == pytest.approx(2 * SIZE / (0.8 * machine.bandwidth))


def test_memory_lives_as_long_as_any_shape_in_it() -> None:
    with Trace() as trace:
        x = torch.empty(6, 8)
        view = x.T[2:]
        del x
        torch.empty(6, 8)
        del view
        torch.empty(6, 8)
    assert trace.traced.peak == 2 * SIZE
    assert [life.gone is None for life in trace._lives] == [False] * 3


def test_a_view_is_in_the_memory_of_what_it_views_when_it_is_remembered_too() -> None:
    with Trace():
        for _ in range(2):
            x = torch.empty(6, 8)
            parts = x.split(2, dim=1)
            assert all(part.memory is x.memory for part in (*parts, x.T, x[1:], x.view(48)))
            assert (parts[3].laid, parts[3].storage_offset()) == (((6, 2), (8, 1), 6, torch.float32), 6)
            assert (x + x).memory is not x.memory
            assert x.mul_(2) is x
            assert x.unsqueeze_(0).shape == (1, 6, 8)
            assert x.mT.shape == (1, 8, 6)
