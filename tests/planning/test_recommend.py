"""What is recommended fits, and says why."""

import pytest

import deltatune
from deltatune import UserError
from deltatune.files import write_json
from deltatune.planning import recommend as module
from deltatune.planning.budget import read_bytes, read_seconds
from deltatune.planning.plan import Plan, plan_run
from deltatune.planning.recommend import GUIDE, Limits, recommend


@pytest.fixture(scope="module")
def data():
    return deltatune.load_data("rotten-tomatoes").limited(train=40, validation=20, test=20, seed=0)


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    return {}


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch, plans: dict[str, Plan]) -> None:
    """Few methods, of which each is planned once: base, data, settings and machine are the same throughout."""

    def planned_once(base, data, method, settings, *, storage, machine):
        words = f"{method}@{storage}"
        if words not in plans:
            plans[words] = plan_run(base, data, method, settings, storage=storage, machine=machine)
        return plans[words]

    monkeypatch.setattr(module, "GUIDE", {name: GUIDE[name] for name in ("dora", "lora", "lora@nf4", "full", "head")})
    monkeypatch.setattr(module, "plan_run", planned_once)


def test_without_evidence_the_guide_ranks_and_is_named(data) -> None:
    found = recommend("minilm", data, Limits())
    assert [one.method for one in found][:2] == ["dora", "lora"]
    assert all("guide" in one.evidence for one in found)


def test_what_exceeds_a_limit_is_out_and_says_so(data) -> None:
    found = recommend("minilm", data, Limits(adapter=2_000_000))
    [full] = [one for one in found if one.method == "full"]
    assert "its file has" in full.out
    assert found[0].method != "full"
    assert not full.pareto


def test_measured_evidence_goes_before_the_guide(data, tmp_path) -> None:
    for name, score in (("full", 0.9), ("lora", 0.8)):
        cell = tmp_path / "cells" / name
        cell.mkdir(parents=True)
        write_json(cell / "result.json", {"method": name, "metric": "accuracy", "test": {"accuracy": score}})
        write_json(cell / "spec.json", {"data": {"name": "rotten-tomatoes"}, "method": {"storage": {}}})
    found = recommend("minilm", data, Limits(), runs=[tmp_path])
    assert [one.method for one in found][:3] == ["full", "lora", "dora"]
    assert found[0].evidence == "measured in 1 run"


def test_the_goal_decides_among_those_that_fit(data) -> None:
    assert recommend("minilm", data, Limits(), "size")[0].method == "head"


def test_budgets_are_read_in_words() -> None:
    assert read_bytes("4GB") == 4_000_000_000
    assert read_seconds("1.5h") == 5400
    with pytest.raises(UserError, match="no time"):
        read_seconds("soon")
    with pytest.raises(UserError, match="no size"):
        read_bytes("much")
