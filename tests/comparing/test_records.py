"""results.csv, results.parquet and results.md: the same figures for programs and for people."""

import csv
import json

import pyarrow.parquet as pq
import pytest

from deltatune.comparing import table
from deltatune.comparing.records import markdown, write_tables


@pytest.fixture(scope="module")
def folder(comparison, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    write_tables(folder, comparison.results, comparison.failed)
    return folder


def test_the_csv_has_a_line_for_each_cell_with_raw_figures(comparison, folder):
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(comparison.results) + len(comparison.failed)
    lora = next(line for line in lines if line["label"] == "lora")
    assert float(lora["accuracy"]) == comparison.results[5].quality
    assert float(lora["accuracy_low_95"]) < float(lora["accuracy"]) < float(lora["accuracy_high_95"])
    assert float(lora["train_share_of_full"]) == pytest.approx(60 / 99)
    assert int(lora["peak_bytes"]) - int(lora["baseline_bytes"]) == int(lora["above_baseline_bytes"])
    assert json.loads(lora["options"])["rank"] == 8
    assert (lines[-1]["status"], lines[-1]["accuracy"]) == ("failed", "")
    assert lines[-1]["reason"] == "the loss became <b>nan</b> at step 31"
    assert lines[-1]["hint"] == "lower the learning rate"


def test_the_parquet_file_has_the_lines_of_the_csv_with_their_types(comparison, folder):
    lines = pq.read_table(folder / "results.parquet").to_pylist()
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        written = list(csv.DictReader(file))
    assert [{name: "" if value is None else str(value) for name, value in line.items()} for line in lines] == written
    assert lines[0]["accuracy"] == comparison.results[0].quality
    assert isinstance(lines[0]["peak_bytes"], int)
    assert lines[-1]["accuracy"] is None


def test_the_markdown_table_has_a_row_for_each_method_and_no_label_breaks_it(comparison, folder):
    lines = (folder / "results.md").read_text(encoding="utf-8").splitlines()
    rows = lines[: lines.index("")]
    assert len(rows) == 2 + 5
    assert len({row.replace("\\|", "").count("|") for row in rows}) == 1
    assert rows[0].startswith("| Method | Accuracy [95%] | Against full, points | Verdict |")
    full, head, lora, script, failed = rows[2:]
    assert "| reference |" in full
    assert "| worse |" in head
    assert "| not distinguishable |" in lora
    assert f"| {table.percent(sum(c.quality for c in comparison.results[5:8]) / 3)} [" in lora
    assert "\\<script\\>alert" in script
    assert "| failed |" in failed
    assert "Figures are means over up to 3 seeds" in lines[-1]


def test_a_table_of_nothing_is_a_table(tmp_path):
    write_tables(tmp_path, [])
    assert (tmp_path / "results.md").read_text() == markdown([])
    assert pq.read_table(tmp_path / "results.parquet").num_rows == 0
