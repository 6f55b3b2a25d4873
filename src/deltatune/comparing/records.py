"""The comparison as files for other programs and people: results.csv, results.parquet and results.md."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deltatune.comparing import table
from deltatune.comparing.provenance import different_code
from deltatune.comparing.quality import named
from deltatune.comparing.results import CellResult, FailedCell
from deltatune.comparing.statistics import mean_interval
from deltatune.comparing.table import Row, full_cells, time_share
from deltatune.files import write_bytes, write_text


def write_tables(
    folder: Path,
    results: Sequence[CellResult],
    failed: Sequence[FailedCell] = (),
    smaller: Sequence[CellResult] = (),
) -> None:
    """Writes results.csv and results.parquet, a line for each cell, and results.md, a line for each method.

    `smaller` are the cells that were trained on fewer examples, which stand in no table of methods.
    """
    write_csv(folder / "results.csv", [*results, *smaller], failed)
    write_parquet(folder / "results.parquet", [*results, *smaller], failed)
    mixed = different_code([*results, *smaller])
    write_text(folder / "results.md", markdown(table.rows(results, failed)) + (f"\n{mixed}\n" if mixed else ""))


def records(results: Sequence[CellResult], failed: Sequence[FailedCell] = ()) -> list[dict[str, Any]]:
    """One flat record for each cell with the unit in its names: the lines of results.csv, ready for JSON."""
    full = full_cells(results)
    done = [
        {
            **_identity(cell, "done"),
            **_measured(cell),
            "train_share_of_full": time_share(cell.train_seconds, full),
            "reason": "",
            "hint": "",
        }
        for cell in results
    ]
    not_done = [
        {
            **_identity(cell, "failed"),
            **dict.fromkeys([*(_measured(results[0]) if results else _COST), "train_share_of_full"]),
            "reason": cell.reason,
            "hint": cell.hint,
        }
        for cell in failed
    ]
    return done + not_done


def _identity(cell: CellResult | FailedCell, status: str) -> dict[str, Any]:
    return {
        "label": cell.label,
        "method": cell.method,
        "options": cell.options,
        "seed": cell.seed,
        "status": status,
    }


def write_csv(path: Path, results: Sequence[CellResult], failed: Sequence[FailedCell] = ()) -> None:
    """Writes `records` to `path`; the options of a method are one column of JSON."""
    lines = records(results, failed)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**line, "options": json.dumps(line["options"], ensure_ascii=False)} for line in lines)
    write_text(path, text.getvalue())


def write_parquet(path: Path, results: Sequence[CellResult], failed: Sequence[FailedCell] = ()) -> None:
    """Writes `records` to `path` with their types; the options of a method are one column of JSON."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = [{**line, "options": json.dumps(line["options"], ensure_ascii=False)} for line in records(results, failed)]
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(lines), buffer)
    write_bytes(path, buffer.getvalue().to_pybytes())


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table for a README, with the sentence on what its intervals cover."""
    figures = next((row.figures for row in rows if row.figures), None)
    reference = next((row.label for row in rows if row.is_reference), "")
    quality = f"{named(figures.metric).title} [95%]" if figures else "Quality"
    heads = ["Method", quality, f"Against {reference}, points" if reference else "Difference"]
    heads += ["Verdict", "Training", "Of full", "Peak memory", "Trained", "Stored"]
    lines = [heads, ["---", *["---:"] * 2, "---", *["---:"] * 5], *(_markdown_row(row) for row in rows)]
    note = table.what_intervals_cover(rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + (f"\n\n{note}\n" if note else "\n")


def _markdown_row(row: Row) -> list[str]:
    label = "".join(f"\\{letter}" if letter in r"\|*_`<>[]" else letter for letter in row.label)
    figures = row.figures
    if figures is None:
        return [label, "failed", *[""] * 7]
    gap = figures.difference
    return [
        label,
        f"{table.percent(figures.quality.mean)} [{table.interval_text(figures.interval)}]",
        f"{table.points(gap.value)} {table.points_interval(gap.interval)}" if gap else "",
        gap.verdict if gap else "reference" if row.is_reference else "no common seed",
        table.seconds(figures.train_seconds.mean),
        "" if figures.time_share is None else f"{figures.time_share:.0%}",
        table.size(figures.peak_bytes.mean),
        f"{table.count(figures.trainable)} ({table.small_percent(figures.trainable_share)})",
        table.size(figures.adapter_bytes.mean),
    ]


def _measured(cell: CellResult) -> dict[str, float | str | None]:
    interval = mean_interval([cell])
    return {
        **{"test_loss" if name == "loss" else name: value for name, value in cell.test.items()},
        f"{cell.metric}_low_95": interval.low,
        f"{cell.metric}_high_95": interval.high,
        "test_examples": len(cell.test_values),
        **{f"validation_{name}": value for name, value in cell.validation.items()},
        "train_loss": cell.train_loss,
        **(
            {"plain_text_loss_before": cell.plain_text[0], "plain_text_loss": cell.plain_text[1]}
            if cell.plain_text
            else {}
        ),
        **{name: value(cell) for name, value in _COST.items()},
    }


_COST: dict[str, Callable[[CellResult], float | str | None]] = {
    "train_examples": lambda cell: cell.train_examples,
    "truncated_examples": lambda cell: cell.truncated,
    "steps": lambda cell: cell.steps,
    "train_seconds": lambda cell: cell.train_seconds,
    "examples_per_second": lambda cell: cell.examples_per_second,
    "tokens_per_second": lambda cell: cell.tokens_per_second,
    "peak_bytes": lambda cell: cell.peak_bytes,
    "baseline_bytes": lambda cell: cell.baseline_bytes,
    "above_baseline_bytes": lambda cell: cell.peak_bytes - cell.baseline_bytes,
    "planned_seconds": lambda cell: cell.planned_seconds,
    "planned_peak_bytes": lambda cell: cell.planned_peak_bytes,
    "training_peak_bytes": lambda cell: cell.training_peak_bytes or None,
    "trainable_parameters": lambda cell: cell.trainable,
    "total_parameters": lambda cell: cell.total,
    "trainable_share": lambda cell: cell.trainable / cell.total,
    "adapter_bytes": lambda cell: cell.adapter_bytes,
    "model_bytes": lambda cell: cell.model_bytes,
    "precision": lambda cell: cell.precision,
    "latency_base_seconds": lambda cell: cell.latency.base if cell.latency else None,
    "latency_adapted_seconds": lambda cell: cell.latency.adapted if cell.latency else None,
    "latency_merged_seconds": lambda cell: cell.latency.merged if cell.latency else None,
    "drift": lambda cell: cell.drift,
}
