"""What `deltatune compare` shows in a terminal while it runs."""

import io

from rich.console import Console

from deltatune.cli.live import LiveTable
from deltatune.comparing.experiment import TrialCell, make_experiment
from deltatune.comparing.results import FailedCell
from deltatune.training.events import Evaluated, Finished, Started, Step

STARTED = Started(100, 2.0, 640, 1_000, 9_000, "fp32", 0)
HALF = Step(50, 1.0, 0.4321, 1e-3, 1.0, 640, 9_000, 30.0)


def shown(table: LiveTable, width: int = 110) -> list[str]:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table._shown())
    return console.file.getvalue().splitlines()


def row(lines: list[str], label: str) -> str:
    [line] = [line for line in lines if line.startswith(label)]
    return " ".join(line.split())


def test_each_run_has_a_row_with_its_state_loss_quality_and_time_left():
    cells = make_experiment({"methods": ["full", "head", "lora"]}).cells()
    full, head, _ = cells
    table = LiveTable(Console(file=io.StringIO(), height=40))
    assert "loading base and data" in " ".join(shown(table))
    table.expect(cells)
    assert row(shown(table), "full") == "full seed 0 waiting"
    for event in (STARTED, HALF, Evaluated(50, 1.0, "validation", {"accuracy": 0.75, "loss": 0.5}, 100, 1.0)):
        table.watch(full, event)
    assert row(shown(table), "full").endswith("50/100 0.432 val 75.0% 30.0s 30.0s")
    assert shown(table)[-1] == "0 of 3 runs, 2m 30s left"
    table.watch(full, Finished(100, 60.0, 100))
    assert "testing" in row(shown(table), "full")
    gone = FailedCell(label="head", method="head", options={}, seed=0, reason="[red]out[/] of memory")
    table.watch(head, gone)
    assert "[red]out[/] of memory" in row(shown(table), "head"), "a reason is no markup"
    assert all(len(line) <= 60 for line in shown(table, 60))


def test_the_trials_of_a_search_share_a_row_that_shows_the_newest():
    [cell] = make_experiment({"methods": ["lora"]}).cells()
    table = LiveTable(Console(file=io.StringIO(), height=40))
    for number in (0, 1):
        table.watch(TrialCell(**{**cell.model_dump(), "trial": number}), STARTED)
    assert row(shown(table), "lora").startswith("lora trial 1 training")


def test_with_more_runs_than_lines_those_that_run_are_shown_and_in_the_end_all():
    cells = make_experiment({"methods": ["head"], "seeds": list(range(60))}).cells()
    table = LiveTable(Console(file=io.StringIO(), height=20))
    table.expect(cells)
    table.watch(cells[40], STARTED)
    lines = shown(table)
    assert len(lines) < 20
    assert any("seed 40 training" in " ".join(line.split()) for line in lines)
    with table:
        pass
    assert sum("seed" in line for line in shown(table)) == 60
