"""The columns of the page's table: how each is called, what it means, what it shows and what it is sorted by."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from deltatune.comparing import table
from deltatune.comparing.quality import named
from deltatune.comparing.table import Figures, Row, Spread


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the page's table: how it is called, what it means, what it shows and what it is sorted by."""

    group: str
    title: str
    meaning: str
    show: Callable[[Figures], str]
    sort: Callable[[Figures], float | None]
    below: Callable[[Figures], str] = lambda figures: ""
    """What stands in small type under the figure: an interval, or the least and greatest over seeds."""


def _plain(
    group: str,
    title: str,
    meaning: str,
    sort: Callable[[Figures], float | None],
    text: Callable[[float], str],
    below: Callable[[Figures], str] = lambda figures: "",
) -> Column:
    def show(figures: Figures) -> str:
        value = sort(figures)
        return "" if value is None else text(value)

    return Column(group, title, meaning, show, sort, below)


def _over_seeds(
    group: str, title: str, meaning: str, spread: Callable[[Figures], Spread], text: Callable[[float], str]
) -> Column:
    def below(figures: Figures) -> str:
        low, high = text(spread(figures).low), text(spread(figures).high)
        return "" if low == high else f"{low} – {high}"

    return _plain(group, title, meaning, lambda figures: spread(figures).mean, text, below)


def _three_decimals(number: float) -> str:
    return f"{number:.3f}"


def _gap_interval(figures: Figures) -> str:
    return table.points_interval(figures.difference.interval) if figures.difference else ""


_SIGNS = {"better": "▲ better", "worse": "▼ worse", "not distinguishable": "≈ not distinguishable"}


def columns(rows: Sequence[Row]) -> tuple[Column, ...]:
    """The columns of the page's table, in order, those of a group together."""
    first = next((row.figures for row in rows if row.figures), None)
    latencies = [figures.latency for row in rows if (figures := row.figures)]
    every = [*(_quality(first) if first else ()), *_COST, *_latency({name for times in latencies for name in times})]
    return tuple(sorted(every, key=lambda column: _GROUPS.index(column.group)))


def _quality(figures: Figures) -> Iterator[Column]:
    """What the task's figures are, the metric first."""
    metric = named(figures.metric)
    yield _plain(
        "Quality",
        metric.title,
        f"{metric.meaning} Mean over seeds; below it the 95% interval.",
        lambda figures: figures.quality.mean,
        table.percent,
        lambda figures: table.interval_text(figures.interval),
    )
    yield _plain(
        "Quality",
        "Difference",
        f"{metric.title} minus the reference's, in percentage points; below it the 95% interval.",
        lambda figures: figures.difference.value if figures.difference else None,
        table.points,
        _gap_interval,
    )
    yield Column(
        "Quality",
        "Verdict",
        "Better or worse than the reference, corrected for the number of pairs (Holm); else not distinguishable.",
        lambda figures: _SIGNS[figures.difference.verdict] if figures.difference else "",
        lambda figures: figures.difference.interval.low if figures.difference else None,
    )
    for name in figures.test:
        if name != figures.metric:
            yield _figure(name, named(name).title, named(name).meaning, "test")
    for name in figures.validation:
        title = f"Validation {named(name).word.removeprefix('test ')}"
        meaning = "On the split that chooses among checkpoints and learning rates, so a little too kind."
        yield _figure(name, title, meaning, "validation")
    if figures.forgotten:
        yield _over_seeds(
            "Quality",
            "Forgotten",
            "By how much the loss on a fixed text that is not the task rose in training, in nats a token.",
            lambda figures: figures.forgotten or Spread(0, 0, 0),
            lambda number: f"{number:+.3f}".replace("-", "−"),
        )

    if figures.drift:
        yield _over_seeds(
            "Quality",
            "Drift",
            "How far the states of a fixed text that is not the task moved: 1 − cosine, mean over its tokens.",
            lambda figures: figures.drift or Spread(0, 0, 0),
            _three_decimals,
        )


_GROUPS = ("Quality", "Speed", "Memory", "Size")
_LATENCIES = {
    "base": ("Pass, base", "the base, the adapter switched off"),
    "adapted": ("Pass, adapted", "the adapter beside the base's weights"),
    "merged": ("Pass, merged", "the adapter merged into them; blank where the method does not merge"),
}


def _latency(names: Collection[str]) -> Iterator[Column]:
    for name, (title, what) in _LATENCIES.items():
        if name in names:
            meaning = f"Time of a forward pass on one test example: {what}. Median of interleaved rounds."
            yield _plain("Speed", title, meaning, _latency_of(name), table.milliseconds)


def _latency_of(name: str) -> Callable[[Figures], float | None]:
    return lambda figures: figures.latency[name].mean if name in figures.latency else None


def _figure(name: str, title: str, meaning: str, split: Literal["test", "validation"]) -> Column:
    def spread(figures: Figures) -> Spread:
        found: Spread = getattr(figures, split)[name]
        return found

    return _over_seeds("Quality", title, meaning, spread, table.percent if named(name).share else _three_decimals)


_COST = (
    _over_seeds(
        "Quality",
        "Train loss",
        "Mean over the last tenth of the steps, dropout on.",
        lambda figures: figures.train_loss,
        _three_decimals,
    ),
    _over_seeds(
        "Speed",
        "Training",
        "Time of the optimiser steps alone: no loading, no evaluation.",
        lambda figures: figures.train_seconds,
        table.seconds,
    ),
    _plain(
        "Speed",
        "Of full",
        "Training time as a share of full fine-tuning's; blank where that is not among the methods.",
        lambda figures: figures.time_share,
        lambda share: f"{share:.0%}",
    ),
    _over_seeds(
        "Speed",
        "Examples/s",
        "Training examples for each second of training.",
        lambda figures: figures.examples_per_second,
        table.rate,
    ),
    _over_seeds(
        "Speed",
        "Tokens/s",
        "Real tokens for each second of training; padding is not counted.",
        lambda figures: figures.tokens_per_second,
        table.rate,
    ),
    _over_seeds(
        "Memory",
        "Peak",
        "Largest resident memory of the process that trained this method and nothing else.",
        lambda figures: figures.peak_bytes,
        table.size,
    ),
    _over_seeds(
        "Memory",
        "Baseline",
        "Memory of that process with its libraries imported, before the base was loaded.",
        lambda figures: figures.baseline_bytes,
        table.size,
    ),
    _over_seeds(
        "Memory",
        "Above baseline",
        "Peak minus baseline: what the base, the method and its training took.",
        lambda figures: figures.above_baseline_bytes,
        table.size,
    ),
    _plain("Size", "Trained", "Parameters that get gradients.", lambda figures: figures.trainable, table.count),
    _plain("Size", "All", "Parameters of the adapted model.", lambda figures: figures.total, table.count),
    _plain("Size", "Ratio", "Trained of all.", lambda figures: figures.trainable_share, table.small_percent),
    _over_seeds(
        "Size", "Adapter", "Bytes on disk of what was saved.", lambda figures: figures.adapter_bytes, table.size
    ),
    _plain(
        "Size",
        "Model",
        "Bytes in memory of the adapted model's parameters and buffers.",
        lambda figures: figures.model_bytes,
        table.size,
    ),
)
"""The columns that every task has."""
