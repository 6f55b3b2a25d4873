"""Every chart of a comparison, in the order of the page; here those with a row for each method."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import altair as alt

from deltatune.comparing import table
from deltatune.comparing.charts import (
    INK,
    Done,
    Plot,
    axis_below,
    bars,
    colour,
    colours,
    marks,
    metric,
    names_and_notes,
    plot,
    row_axis,
    seed_dots,
    unit_of_time,
)
from deltatune.comparing.curves import Curves, learning, losses, sweeps
from deltatune.comparing.fronts import fronts
from deltatune.comparing.quality import named
from deltatune.comparing.results import CellResult
from deltatune.comparing.table import Row


def plots(
    rows: Sequence[Row], results: Sequence[CellResult], curves: Curves, smaller: Sequence[CellResult] = ()
) -> list[Plot]:
    """Every chart for which there are figures; none where no cell finished."""
    done = [(row, row.figures) for row in rows if row.figures is not None]
    if not done:
        return []
    palette = colours(rows)
    reference = next(row.label for row in rows if row.is_reference)
    done.sort(key=lambda pair: -pair[1].quality.mean)
    drawn = [_quality(done, results, palette)]
    if any(figures.difference for _, figures in done):
        drawn.append(_difference(done, reference, palette))
    drawn += fronts(done, palette)
    drawn += [_time(done, results, palette), _memory(done, palette)]
    drawn += [_planned(done, what, palette) for what in ("time", "memory") if any(what in f.planned for _, f in done)]
    drawn += [*sweeps(done, palette), *learning(done, [*results, *smaller], palette)]
    drawn += losses([row.label for row, _ in done], curves, reference, palette)
    return drawn


def _quality(done: Done, results: Sequence[CellResult], palette: Mapping[str, str]) -> Plot:
    values = [
        {
            "label": row.label,
            "value": figures.quality.mean,
            "low": figures.interval.low,
            "high": figures.interval.high,
            "note": f"{table.percent(figures.quality.mean)}  [{table.interval_text(figures.interval)}]",
        }
        for row, figures in done
    ]
    x = alt.X("value:Q", scale=alt.Scale(domain=[0, 1]), axis=axis_below(format="%", tickCount=5, title=None))
    interval = marks(values).mark_rule(strokeWidth=1.5, yOffset=19).encode(x="low:Q", x2="high:Q", y=row_axis(values))
    dots, about_dots = seed_dots(done, [(cell.label, cell.quality) for cell in results])
    return plot(
        "quality",
        f"{metric(done)} on the test split",
        f"{named(done[0][1].metric).meaning} Lines: 95% interval.{about_dots}",
        alt.layer(*bars(values, x, palette), interval, *dots),
        (f"{value['label']}: {value['note']}" for value in values),
    )


def _difference(done: Done, reference: str, palette: Mapping[str, str]) -> Plot:
    gaps: list[dict[str, Any]] = [
        {
            "label": row.label,
            "value": 100 * gap.value,
            "low": 100 * gap.interval.low,
            "high": 100 * gap.interval.high,
            "note": f"{table.points(gap.value)}  {table.points_interval(gap.interval)}",
            "verdict": gap.verdict,
        }
        for row, figures in done
        if (gap := figures.difference)
    ]
    reach = 1.1 * max(0.5, *(abs(gap[end]) for gap in gaps for end in ("low", "high")))
    signed = "datum.value == 0 ? '0' : format(datum.value, '+.2~f')"
    x = alt.X("value:Q", scale=alt.Scale(domain=[-reach, reach]), axis=axis_below(labelExpr=signed, title=None))
    settled = alt.condition("datum.verdict == 'not distinguishable'", alt.value(0), alt.value(1))
    tooltip = ["label:N", "note:N", "verdict:N"]
    chart = marks(gaps).encode(y=row_axis(gaps), color=colour(palette), tooltip=tooltip)
    zero = marks([{"value": 0}]).mark_rule(strokeDash=[3, 3], opacity=0.7).encode(x=x)
    lines = chart.mark_rule(strokeWidth=3, yOffset=8).encode(x=alt.X("low:Q"), x2="high:Q")
    means = chart.mark_point(size=80, strokeWidth=2.5, opacity=1, yOffset=8).encode(
        x=x, fill=colour(palette, alt.Fill), fillOpacity=settled
    )
    return plot(
        "difference",
        f"{metric(done)} against {reference}, in points",
        "Lines: 95% interval, paired on the same test examples. A hollow point is not distinguishable from no "
        "difference, corrected for the number of pairs.",
        alt.layer(zero, lines, means, *names_and_notes(gaps)),
        (f"{gap['label']}: {gap['note']}, {gap['verdict']}" for gap in gaps),
    )


def _time(done: Done, results: Sequence[CellResult], palette: Mapping[str, str]) -> Plot:
    """Training time: in shares of full fine-tuning's where that is among the methods, else in seconds."""
    full = next((f.train_seconds.mean / f.time_share for _, f in done if f.time_share), None)
    unit, length = (None, full) if full else unit_of_time(done)
    values = [
        {
            "label": row.label,
            "value": figures.train_seconds.mean / length,
            "note": table.seconds(figures.train_seconds.mean)
            + ("" if figures.time_share is None else f"  ({figures.time_share:.0%})"),
        }
        for row, figures in done
    ]
    dots, about_dots = seed_dots(done, [(cell.label, cell.train_seconds / length) for cell in results])
    style = axis_below(title=unit, **({"format": "%"} if full else {}))
    x = alt.X("value:Q", scale=alt.Scale(domainMin=0, nice=True), axis=style)
    tick = marks([{**value, "value": 1} for value in values]).mark_tick(
        orient="vertical", size=20, thickness=1.5, yOffset=8, color=INK, opacity=0.8
    )
    whole = [tick.encode(x="value:Q", y=row_axis(values))] if full else []
    about_share = " Ticks: full fine-tuning, 100%." if full else ""
    return plot(
        "time",
        "Training time",
        f"Optimiser steps alone: no loading, no evaluation.{about_share}{about_dots}",
        alt.layer(*bars(values, x, palette), *whole, *dots),
        (f"{value['label']}: {value['note']}" for value in values),
    )


def _memory(done: Done, palette: Mapping[str, str]) -> Plot:
    largest = max(figures.peak_bytes.mean for _, figures in done)
    unit, length, digits = ("GB", 1e9, 2) if largest >= 1e9 else ("MB", 1e6, 0)
    values = []
    for row, figures in done:
        baseline, above = figures.baseline_bytes.mean / length, figures.above_baseline_bytes.mean / length
        note = f"{baseline:.{digits}f} + {above:.{digits}f} = {baseline + above:.{digits}f} {unit}"
        values.append({"label": row.label, "part": "baseline", "from": 0, "value": baseline, "note": note})
        values.append(
            {"label": row.label, "part": "training", "from": baseline, "value": baseline + above, "note": note}
        )
    x = alt.X("value:Q", scale=alt.Scale(domainMin=0, nice=True), axis=axis_below(title=unit))
    shade = alt.Opacity("part:O", scale=alt.Scale(domain=["baseline", "training"], range=[0.35, 1]), legend=None)
    bar, *words = bars(values, x, palette)
    return plot(
        "memory",
        "Peak memory",
        "Pale: the process with its libraries, before the base was loaded. Full: what base, method and training added.",
        alt.layer(bar.encode(x2="from:Q", opacity=shade), *words),
        (f"{value['label']}: {value['note']}" for value in values[::2]),
    )


def _planned(done: Done, what: Literal["time", "memory"], palette: Mapping[str, str]) -> Plot:
    """What was measured, as a bar, with a tick where the plan put it."""
    tell = table.seconds if what == "time" else table.size
    known = [(row.label, *figures.planned[what]) for row, figures in done if what in figures.planned]
    unit, length = unit_of_time(done) if what == "time" else ("MB", 10**6)
    values = [
        {
            "label": label,
            "value": measured / length,
            "planned": plan / length,
            "note": f"{tell(measured)}, planned {tell(plan)} ({plan / (measured or 1) - 1:+.0%})".replace("-", "−"),
        }
        for label, plan, measured in known
    ]
    x = alt.X("value:Q", scale=alt.Scale(domainMin=0, nice=True), axis=axis_below(title=unit))
    tick = marks(values).mark_tick(orient="vertical", size=20, thickness=2, yOffset=8, color=INK, opacity=1)
    return plot(
        f"planned-{what}",
        f"Planned and measured {what}",
        "Bars: measured. Ticks: planned before anything was loaded. In brackets: the plan's error."
        + (" Memory is of the process until its training ended." if what == "memory" else ""),
        alt.layer(*bars(values, x, palette), tick.encode(x="planned:Q", y=row_axis(values))),
        (f"{value['label']}: {value['note']}" for value in values),
    )
