"""docs/speed.md and the README's table say what benchmarks/results says, whichever way it went."""

from pathlib import Path

import pytest
import speed_page
from race.circumstances import machine_folder, machine_name

ROOT = Path(__file__).parent.parent
WORK = "minilm"
AROUND = {
    "quick": False,
    "command": "python benchmarks/bench.py",
    "commit": "0123456789abcdef+",
    "date": "2026-11-22T18:00+00:00",
    "versions": {"torch": "2.13.0"},
    "machine": {"processor": "A Processor", "bf16": [], "cores": 2, "threads": 2, "memory_gb": 24, "load": 0.1},
}


def contestant(seconds: list[float], *, peak: int = 100, first: float = 2.0) -> dict:
    steps = [{"seconds": took, "tokens": 10, "examples": 2, "loss": 1.0} for took in seconds]
    told = {"settings": {"rank": 8}, "environment": {"OMP": "1"}, "quality": {"loss": 0.512}}
    return {"what": "a run", "steps": steps, "peak_bytes": peak, "first_step": [first], **told}


def result(**contestants: dict) -> dict:
    check = {"check": "as many examples", "apart": 0.031, "allowed": 0.02, "holds": False}
    return {**AROUND, "what": "A work", "warm": 0.5, "contestants": contestants, "checks": [check]}


def test_the_page_of_speed_and_the_readme_say_what_was_measured() -> None:
    results = speed_page.read()
    assert (ROOT / "docs" / "speed.md").read_text(encoding="utf-8") == speed_page.page(results), "run `make speed`"
    assert speed_page.readme_part(results) in (ROOT / "README.md").read_text(encoding="utf-8"), "run `make speed`"


def test_a_ratio_is_the_median_of_those_within_a_round_without_the_rounds_of_warming_up() -> None:
    slow = result(
        deltatune=contestant([90, 90, 90, 1, 2, 4]), trainer=contestant([1, 1, 1, 3, 8, 8]), probe=contestant([0] * 6)
    )
    assert speed_page.value(slow, speed_page.Goal(WORK, "deltatune", "trainer", "faster", 1)) == pytest.approx(3)
    assert speed_page.value(slow, speed_page.Goal(WORK, "trainer", "deltatune", "cost", 1)) == pytest.approx(3)


@pytest.mark.parametrize(("measure", "more"), [("faster", True), ("reached", True), ("cost", False), ("memory", False)])
def test_a_goal_that_was_missed_is_shown_like_one_that_was_met(measure: str, more: bool, monkeypatch) -> None:
    one = result(deltatune=contestant([1, 1], peak=50), trainer=contestant([2, 2], peak=100))
    reached = speed_page.value(one, speed_page.Goal(WORK, "deltatune", "trainer", measure, 1))
    for aim, met in ((0.9 * reached, more), (1.1 * reached, not more)):
        monkeypatch.setattr(speed_page, "GOALS", (speed_page.Goal(WORK, "deltatune", "trainer", measure, aim),))
        table = speed_page.goals({"A": {WORK: one}, "B": {}}, aims=True)
        assert f"{reached:.2f} ({'met' if met else '**missed**'}) |  |" in table


def test_a_work_is_shown_with_its_circumstances_settings_and_the_checks_that_fail() -> None:
    shown = speed_page.work_section(result(deltatune=contestant([1, 1]), trainer=contestant([4, 4], peak=2_000_000)))
    for words in (
        "A Processor",
        "0123456789+",
        "4.00 (4.00 to 4.00)",
        "**fails**: as many examples: 3.1% apart",
        '"rank": 8',
    ):
        assert words in shown
    assert "mean nothing" not in shown
    assert "mean nothing" in speed_page.work_section({**result(deltatune=contestant([1, 1])), "quick": True})


def test_machines_are_told_apart_by_processor_and_by_how_they_multiply(monkeypatch) -> None:
    intel = {"processor": "Intel(R) Xeon(R) Platinum 8480+ CPU @ 2.00GHz", "bf16": ["amx_bf16", "avx512_bf16"]}
    assert machine_name(intel) == "Intel Xeon Platinum 8480+, AMX"
    assert machine_folder(intel).name == "intel-xeon-platinum-8480-amx"
    assert machine_name({"processor": "AMD EPYC", "bf16": []}) == "AMD EPYC, no bf16"
    monkeypatch.setattr(speed_page, "GOALS", ())
    one = result(deltatune=contestant([1, 1]))
    shown = speed_page.page({"A": {WORK: one}, "B": {WORK: one}})
    assert shown.index("## On A") < shown.index("### A work") < shown.index("## On B")


def test_growth_is_shown_beside_its_theory() -> None:
    row = {"size": 8, "seconds": 0.5, "bytes": 3e6, "operations": 2e9, "kept": 1e6}
    exponents = {"seconds": 1.31, "operations": 1.0, "bytes": 0.52, "kept": 0.98}
    shown = speed_page.growth_section(
        {**AROUND, "sweeps": {"tokens": {"rows": [row], "exponents": exponents, "worse": ["seconds"]}}}
    )
    assert "| tokens in a batch | 1.31 | 1.00 | 0.52 | 0.98 | time |" in shown
    assert "| 8 | 500 | 3 | 2 | 1 |" in shown
