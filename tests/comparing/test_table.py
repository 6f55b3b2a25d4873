import io
import json
import subprocess
import sys
from dataclasses import asdict

import pytest
from rich.console import Console

from deltatune.comparing import compare, table
from deltatune.comparing.records import records
from deltatune.comparing.results import FailedCell
from deltatune.comparing.summary import summary
from deltatune.files import write_text


def printed(comparison, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table.terminal_table(table.rows(comparison.results, comparison.failed), width))
    return console.file.getvalue()


def test_there_is_one_row_for_each_label_in_order_with_failed_ones_among_them(comparison):
    rows = table.rows(comparison.results, comparison.failed)
    assert [row.label.split(" <")[0] for row in rows] == ["full", "head", "lora", "lora", "lora rank=64"]
    assert [row.seeds for row in rows] == [(0, 1, 2), (0, 1), (0, 1, 2), (0,), ()]
    assert rows[1].failures == ("seed 2: the process was ended by signal 9 (KILL)",)
    assert rows[4].figures is None
    assert rows[4].failures == ("seed 0: the loss became <b>nan</b> at step 31 (hint: lower the learning rate)",)


def test_full_fine_tuning_is_the_reference_wherever_it_stands(make_cell):
    rows = table.rows([make_cell("lora"), make_cell("everything", "full", seconds=120)])
    assert [row.is_reference for row in rows] == [False, True]
    assert rows[0].figures.time_share == 0.5
    assert rows[1].figures.difference is None


def test_without_full_fine_tuning_the_first_label_that_finished_is_the_reference(make_cell):
    gone = FailedCell(label="full", method="full", options={}, seed=0, reason="out of memory")
    rows = table.rows([make_cell("lora"), make_cell("head")], [gone])
    assert [row.label for row in rows if row.is_reference] == ["lora"]
    assert [row.figures.time_share for row in rows if row.figures] == [None, None]
    assert rows[1].figures.difference.verdict == "not distinguishable"


def test_the_reference_is_the_experiments_first_method_whichever_seed_it_failed_with(make_cell, tmp_path, monkeypatch):
    """Cells come seed by seed, so that the first that finished is another method's."""
    told = []
    monkeypatch.setattr(compare, "write_report", lambda *given: told.append(given) or tmp_path / "report.html")
    labels = ["lora", "head", "bitfit"]
    gone = FailedCell(label="lora", method="lora", options={}, seed=0, reason="out of memory")
    ran = [make_cell(label, label, seed) for seed in (0, 1) for label in labels if (label, seed) != ("lora", 0)]
    experiment = {"methods": [{"label": label} for label in labels]}
    for number in range(len(ran)):
        write_text(tmp_path / str(number) / "events.jsonl", "")
    done = compare.write_results(
        tmp_path, experiment, [(tmp_path / str(n), cell) for n, cell in enumerate(ran)], [gone]
    )
    rows = table.rows(done.results, done.failed)
    assert [(row.label, row.is_reference, row.seeds) for row in rows] == [
        ("lora", True, (1,)),
        ("head", False, (0, 1)),
        ("bitfit", False, (0, 1)),
    ]
    assert [row.figures.difference.seeds for row in rows[1:]] == [(1,), (1,)]
    assert "lora failed in part: differences to it are made from seed 1 alone. 1 of 6 runs failed" in summary(rows)
    assert told[0][2] == done.results, "the report has the same order"
    assert "Against lora, points" in (tmp_path / "results.md").read_text()


def test_that_full_fine_tuning_is_not_the_reference_since_it_failed_is_said(make_cell):
    gone = FailedCell(label="full", method="full", options={}, seed=0, reason="out of memory")
    words = summary(table.rows([make_cell("lora"), make_cell("head")], [gone]))
    assert "Full fine-tuning failed with every seed: the others are held against lora." in words


def test_a_row_has_the_mean_and_the_spread_over_its_seeds(make_cell):
    cells = [make_cell(seed=seed, seconds=seconds) for seed, seconds in enumerate((50, 60, 100))]
    (row,) = table.rows(cells)
    assert row.figures.train_seconds == table.Spread(70, 50, 100)
    assert row.figures.above_baseline_bytes.mean == cells[0].peak_bytes - cells[0].baseline_bytes


def test_rows_and_records_are_json(comparison):
    rows = table.rows(comparison.results, comparison.failed)
    assert json.loads(json.dumps([asdict(row) for row in rows], allow_nan=False))[2]["figures"]["difference"]["verdict"]
    assert json.loads(json.dumps(records(comparison.results, comparison.failed), allow_nan=False))


def test_no_cells_make_no_rows():
    assert table.rows([]) == records([]) == []


@pytest.mark.parametrize("width", [72, 80, 100, 110, 120])
def test_the_terminal_table_fits_and_cuts_nothing(comparison, crowd, width: int):
    for text in (printed(comparison, width), printed(crowd, width)):
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= width
        headings = [line for line in text.splitlines() if line.startswith("seeds")]
        assert len(headings) == (1 if width >= 100 else 2)
        assert "model" in headings[-1]
        assert "90.9 MB" in text


def test_the_terminal_table_says_what_failed_and_what_the_intervals_leave_out(comparison, crowd):
    text = printed(comparison, 120)
    assert "head, seed 2: the process was ended by signal 9 (KILL)" in text
    assert "lora rank=64, seed 0: the loss became <b>nan</b> at step 31 (hint: lower the learning rate)" in text
    assert "[bold]" in text, "a label is no markup"
    assert "not the luck of the seed" not in text
    assert "One seed each: the intervals cover the choice of test examples, not the luck of the seed" in printed(
        crowd, 120
    )


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (table.percent(0.8213), "82.1%"),
        (table.small_percent(1.0), "100%"),
        (table.small_percent(0.01373), "1.4%"),
        (table.small_percent(770 / 22_713_986), "0.0034%"),
        (table.points(-0.004), "−0.4"),
        (table.points(0.0123), "+1.2"),
        (table.points(-0.0001), "0.0"),
        (table.count(770), "770"),
        (table.count(22_713_986), "22.7M"),
        (table.count(999_600), "1.00M"),
        (table.size(412_000_000), "412 MB"),
        (table.size(1_424_000_000), "1.42 GB"),
        (table.size(-5_000), "-5.00 kB"),
        (table.seconds(42.25), "42.2s"),
        (table.seconds(59.97), "1m 00s"),
        (table.seconds(7_620), "2h 07m"),
    ],
)
def test_figures_are_written_for_people(written: str, expected: str):
    assert written == expected


def test_tables_load_neither_torch_nor_altair():
    heavy = "{'torch', 'altair', 'jinja2', 'vl_convert'}"
    check = f"import sys, deltatune.comparing.table; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
