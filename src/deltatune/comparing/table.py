"""The comparison as a table with one row for each method, and how it looks in a terminal."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from deltatune.comparing.quality import named
from deltatune.comparing.results import CellResult, FailedCell
from deltatune.comparing.statistics import Difference, Interval, Pair, between, mean_interval, pairs


@dataclass(frozen=True, slots=True)
class Spread:
    """A quantity over the seeds of one method: its mean, least and greatest, all equal for one seed."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured for one label over the seeds that finished. Shares are in [0, 1], times in seconds."""

    metric: str
    """The figure that methods are compared by."""
    quality: Spread
    """That metric on the test split."""
    interval: Interval
    """Of the mean; it covers the choice of test examples and, with several seeds, their luck."""
    difference: Difference | None
    """The metric minus the reference's; None for the reference itself, or where the two share no seed."""
    test: dict[str, Spread]
    """Every figure on the test split by name."""
    validation: dict[str, Spread]
    train_loss: Spread
    forgotten: Spread | None
    """By how much the loss on a fixed text that is not the task rose; None for classifiers."""
    drift: Spread | None
    """How far a classifier's states of that text moved; None for language models."""
    latency: Mapping[str, Spread]
    """Seconds of a forward pass on one example: "base", "adapted" and, where the method merges, "merged"."""
    train_examples: int
    """0 in runs of older versions, which do not say it."""
    train_seconds: Spread
    time_share: float | None
    """Training time as a share of full fine-tuning's; None where that is not among the results."""
    examples_per_second: Spread
    tokens_per_second: Spread
    peak_bytes: Spread
    baseline_bytes: Spread
    above_baseline_bytes: Spread
    """Peak minus baseline: what the base, the method and its training took."""
    planned: Mapping[str, tuple[float, float]]
    """What was planned and what was measured: "time" in seconds and "memory" in bytes, where there was a plan."""
    trainable: int
    total: int
    trainable_share: float
    adapter_bytes: Spread
    model_bytes: int


@dataclass(frozen=True, slots=True)
class Row:
    """All cells of one label."""

    label: str
    method: str
    options: Mapping[str, Any]
    """Every hyperparameter of the method."""
    is_reference: bool
    """Whether the differences of the other rows are measured from this one."""
    seeds: tuple[int, ...]
    """Those that finished."""
    figures: Figures | None
    """None where no seed finished."""
    failures: tuple[str, ...]
    """One sentence for each seed that did not finish."""


def rows(results: Sequence[CellResult], failed: Sequence[FailedCell] = ()) -> list[Row]:
    """One row for each label, in order of appearance.

    The reference is full fine-tuning where it finished, else the first label that did.
    """
    every: list[CellResult | FailedCell] = [*results, *failed]
    firsts = {cell.label: cell for cell in reversed(every)}
    labels = dict.fromkeys(cell.label for cell in every)
    finished = {label: [cell for cell in results if cell.label == label] for label in labels}
    full = full_cells(results)
    reference = (full or finished[results[0].label]) if results else []
    found = pairs(results)
    return [
        Row(
            label=label,
            method=first.method,
            options=first.options,
            is_reference=bool(reference) and label == reference[0].label,
            seeds=tuple(cell.seed for cell in finished[label]),
            figures=_figures(finished[label], reference, full, found) if finished[label] else None,
            failures=tuple(_failure(cell) for cell in failed if cell.label == label),
        )
        for label, first in ((label, firsts[label]) for label in labels)
    ]


def full_cells(results: Sequence[CellResult]) -> list[CellResult]:
    """The cells of the first label that is full fine-tuning."""
    label = next((cell.label for cell in results if cell.method == "full"), None)
    return [cell for cell in results if cell.label == label]


def _figures(
    cells: Sequence[CellResult], reference: Sequence[CellResult], full: Sequence[CellResult], found: Sequence[Pair]
) -> Figures:
    def spread(value: Callable[[CellResult], float]) -> Spread:
        return _spread([value(cell) for cell in cells])

    first = cells[0]
    time = spread(lambda cell: cell.train_seconds)
    return Figures(
        metric=first.metric,
        quality=spread(lambda cell: cell.quality),
        interval=mean_interval(cells),
        difference=None if first.label == reference[0].label else between(found, first.label, reference[0].label),
        test={name: _spread([cell.test[name] for cell in cells]) for name in first.test},
        validation={name: _spread([cell.validation[name] for cell in cells]) for name in first.validation},
        train_loss=spread(lambda cell: cell.train_loss),
        forgotten=spread(_forgotten) if first.plain_text else None,
        drift=spread(lambda cell: cell.drift or 0.0) if first.drift is not None else None,
        latency=_latency(cells),
        train_examples=first.train_examples,
        train_seconds=time,
        time_share=time_share(time.mean, full),
        examples_per_second=spread(lambda cell: cell.examples_per_second),
        tokens_per_second=spread(lambda cell: cell.tokens_per_second),
        peak_bytes=spread(lambda cell: cell.peak_bytes),
        baseline_bytes=spread(lambda cell: cell.baseline_bytes),
        above_baseline_bytes=spread(lambda cell: cell.peak_bytes - cell.baseline_bytes),
        planned=_planned(cells),
        trainable=first.trainable,
        total=first.total,
        trainable_share=first.trainable / first.total,
        adapter_bytes=spread(lambda cell: cell.adapter_bytes),
        model_bytes=first.model_bytes,
    )


def _spread(values: Sequence[float]) -> Spread:
    return Spread(fmean(values), min(values), max(values))


def _planned(cells: Sequence[CellResult]) -> dict[str, tuple[float, float]]:
    pairs: dict[str, list[tuple[float | None, float]]] = {
        "time": [(cell.planned_seconds, cell.train_seconds) for cell in cells],
        "memory": [(cell.planned_peak_bytes, cell.training_peak_bytes) for cell in cells],
    }
    known = {name: [(p, m) for p, m in values if p is not None] for name, values in pairs.items()}
    return {
        name: (fmean(p for p, _ in values), fmean(m for _, m in values)) for name, values in known.items() if values
    }


def _latency(cells: Sequence[CellResult]) -> dict[str, Spread]:
    measured = [cell.latency.model_dump(include={"base", "adapted", "merged"}) for cell in cells if cell.latency]
    names = [name for name, value in measured[0].items() if value is not None] if measured else []
    return {name: _spread([times[name] for times in measured]) for name in names}


def _forgotten(cell: CellResult) -> float:
    before, after = cell.plain_text or (0.0, 0.0)
    return after - before


def time_share(seconds: float, full: Sequence[CellResult]) -> float | None:
    """These seconds of training as a share of full fine-tuning's; None where that did not finish."""
    of_full = fmean(cell.train_seconds for cell in full) if full else 0.0
    return seconds / of_full if of_full else None


def _failure(cell: FailedCell) -> str:
    return f"seed {cell.seed}: {cell.reason}" + (f" (hint: {cell.hint})" if cell.hint else "")


def on_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Of each (cost, quality): whether no other is as good or better at the same cost or less, and better in one."""
    return [
        not any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points) for cost, quality in points
    ]


def terminal_table(rows: Sequence[Row], width: int) -> Group:
    """The rows for a terminal so wide: each cell has a figure and, below it, what puts it in proportion.

    From 100 columns on it is one table; below, what a method brings comes first, and what it costs after it.
    """
    reference = next((row.label for row in rows if row.is_reference), "reference")
    figures = next((row.figures for row in rows if row.figures), None)
    names = (
        [named(name).title for name in (figures.metric, *_beside(figures))] if figures else ["Quality", "", "test loss"]
    )
    brings = [f"{names[0]}\ninterval", f"vs {reference}, points\nverdict", f"{names[1]}\n{names[2].lower()}"]
    costs = ["Training\nof full", "Tokens/s\nexamples", "Memory\nbaseline", "Trained\nof all", "Adapter\nmodel"]
    every = [*brings, *costs]
    parts = [range(len(every))] if width >= _WIDE else [range(len(brings)), range(len(brings), len(every))]
    return Group(*(_part(rows, every, part) for part in parts), Text("\n\n".join(_notes(rows))))


_WIDE = 100


def _beside(figures: Figures) -> tuple[str, str]:
    """The two figures that a terminal shows beside the metric."""
    first = next(name for name in figures.test if name != figures.metric)
    return first, "loss"


def _part(rows: Sequence[Row], headers: Sequence[str], columns: Sequence[int]) -> Table:
    """The table of these columns. Where room is short, names and differences take more lines; the others stay."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 1, 0), header_style="bold")
    table.add_column(Text("Method\nseeds"), overflow="fold")
    for column in columns:
        differs = headers[column].startswith("vs ")
        table.add_column(Text(headers[column]), justify="right", no_wrap=not differs, min_width=18 if differs else None)
    for row in rows:
        name, *cells = _terminal_row(row)
        table.add_row(name, *(cells[column] for column in columns if column < len(cells)))
    return table


_COLOURS = {"better": "green", "worse": "red", "not distinguishable": "yellow"}


def _terminal_row(row: Row) -> list[Text]:
    name = _stacked(row.label, ", ".join(map(str, row.seeds)))
    figures = row.figures
    if figures is None:
        return [name, Text("failed", style="red")]
    gap = figures.difference
    return [
        name,
        _stacked(percent(figures.quality.mean), interval_text(figures.interval)),
        _stacked(
            f"{points(gap.value)} {points_interval(gap.interval)}",
            gap.verdict,
            _COLOURS[gap.verdict],
        )
        if gap
        else _stacked("reference" if row.is_reference else "no common seed", ""),
        _stacked(*(f"{figures.test[name].mean:.3f}" for name in _beside(figures))),
        _stacked(
            seconds(figures.train_seconds.mean), "" if figures.time_share is None else f"{figures.time_share:.0%}"
        ),
        _stacked(rate(figures.tokens_per_second.mean), rate(figures.examples_per_second.mean)),
        _stacked(size(figures.peak_bytes.mean), size(figures.baseline_bytes.mean)),
        _stacked(count(figures.trainable), small_percent(figures.trainable_share)),
        _stacked(size(figures.adapter_bytes.mean), size(figures.model_bytes)),
    ]


def _stacked(above: str, below: str, style: str = "dim") -> Text:
    # Text, not str: rich would read square brackets in a label as markup.
    return Text.assemble(above, "\n", (below, style))


def _notes(rows: Sequence[Row]) -> list[str]:
    failures = [f"{row.label}, {failure}" for row in rows for failure in row.failures]
    return [*(["Failed:\n" + "\n".join(failures)] if failures else []), *([what_intervals_cover(rows)] if rows else [])]


def what_intervals_cover(rows: Sequence[Row]) -> str:
    """One sentence on what the intervals of these rows say about seeds."""
    most = max((len(row.seeds) for row in rows), default=0)
    if most == 0:
        return ""
    if most == 1:
        return (
            "One seed each: the intervals cover the choice of test examples, not the luck of the seed. "
            "A difference may be that luck alone; more seeds would tell."
        )
    return (
        f"Figures are means over up to {most} seeds. Intervals cover the choice of test examples and the luck of the "
        "seed; few seeds that matter much make them wide. Verdicts are corrected for the number of pairs (Holm)."
    )


def percent(share: float) -> str:
    """0.8213 as "82.1%"."""
    return f"{100 * share:.1f}%"


def small_percent(share: float) -> str:
    """A share that may be tiny, to two significant digits: 0.0137 as "1.4%", 0.0000339 as "0.0034%"."""
    value = 100 * share
    return (
        f"{value:.0f}%"
        if value >= 9.95 or value == 0
        else f"{float(f'{value:.1e}'):.10f}".rstrip("0").rstrip(".") + "%"
    )


def points(share: float) -> str:
    """A difference of shares in percentage points with its sign: -0.004 as "−0.4"."""
    value = round(100 * share, 1)
    return f"{value:+.1f}".replace("-", "−") if value else "0.0"


def interval_text(interval: Interval) -> str:
    """An interval of shares: "80.0–84.1"."""
    return f"{100 * interval.low:.1f}–{100 * interval.high:.1f}"


def points_interval(interval: Interval) -> str:
    """An interval of differences in percentage points: "[−1.6, +0.8]"."""
    return f"[{points(interval.low)}, {points(interval.high)}]"


def count(number: float) -> str:
    """A count with at most three significant digits: 22713216 as "22.7M"."""
    return _scaled(number, ("", "k", "M", "B"))


def size(number: float) -> str:
    """Bytes in decimal units with three significant digits: 1_420_000_000 as "1.42 GB"."""
    return _scaled(number, (" B", " kB", " MB", " GB", " TB"))


def _scaled(number: float, units: Sequence[str]) -> str:
    power = 0
    while abs(number) >= 999.5 and power < len(units) - 1:
        number, power = number / 1000, power + 1
    decimals = 0 if power == 0 or abs(number) >= 99.95 else 1 if abs(number) >= 9.995 else 2
    return f"{number:.{decimals}f}{units[power]}"


def rate(number: float) -> str:
    """So many a second: "8,500", or "4.3" where it is slow."""
    return f"{number:,.0f}" if number >= 20 else f"{number:.1f}"


def milliseconds(number: float) -> str:
    """A short duration: "3.2 ms"."""
    return f"{1000 * number:.1f} ms" if number < 0.1 else f"{1000 * number:,.0f} ms"


def seconds(number: float) -> str:
    """A duration: "42.3s", "3m 05s" or "2h 07m"."""
    if number < 59.95:
        return f"{number:.1f}s"
    minutes, rest = divmod(round(number), 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"
