"""The comparison as charts: Vega-Lite as data, drawn alike in the report and in plots/*.svg.

Words and axes take the colour of the page's text, so that one chart serves light and dark. Every mark has its method
written beside it: colour helps the eye, and nothing hangs on it.
"""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import fmean
from typing import Any

import altair as alt
import vl_convert

from deltatune.comparing import table
from deltatune.comparing.quality import named
from deltatune.comparing.results import CellResult
from deltatune.comparing.table import Figures, Row
from deltatune.training.events import Evaluated, Event, Step

Curves = Mapping[tuple[str, int], Sequence[Event]]
"""The events of each cell, by label and seed."""

# Searched for, not picked: any two are at least 0.10 apart in OKLab, also as protanopes and deuteranopes see them
# (Machado et al. 2009), and each has a contrast of 2.2 or more on the page's light and dark ground.
_PALETTE = (
    *("#005aa5", "#ff871e", "#00c396", "#4bb4ff", "#964b00", "#5a0fff"),
    *("#1ea5b4", "#a56969", "#d2690f", "#5a78b4", "#784b5a", "#5a78ff"),
)
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif"
_INK = "currentColor"
_ROW_HEIGHT = 42
_SVG_WIDTH = 720
_CONFIG = {
    "background": "transparent",
    "padding": {"left": 0, "right": 0, "top": 5, "bottom": 5},
    "font": _FONT,
    "view": {"stroke": None},
    "axis": {
        **{"domain": False, "ticks": False, "labelPadding": 6, "titlePadding": 8, "titleFontWeight": "normal"},
        **{"labelFontSize": 11, "titleFontSize": 11, "labelColor": _INK, "titleColor": _INK, "gridColor": _INK},
        **{"labelOpacity": 0.75, "titleOpacity": 0.75, "gridOpacity": 0.13},
    },
    "text": {"color": _INK, "fontSize": 12},
    "rule": {"color": _INK},
    "title": {
        **{"anchor": "start", "frame": "bounds", "offset": 16, "color": _INK, "subtitleColor": _INK},
        **{"fontSize": 15, "fontWeight": 600, "subtitleFontSize": 12, "subtitlePadding": 6, "subtitleLineHeight": 16},
    },
    "header": {"title": None, "labelColor": _INK, "labelFontSize": 12, "labelAnchor": "start", "labelLimit": 180},
}


@dataclass(frozen=True, slots=True)
class Plot:
    """A chart with the words that belong to it."""

    name: str
    """Of its file and of its place in the page."""
    title: str
    caption: str
    """How to read it."""
    spec: dict[str, Any]
    """Vega-Lite. As wide as the element that holds it, or several panels in `columns`."""

    def svg(self) -> str:
        """The chart as a picture that stands alone, with its title and caption."""
        title = {"text": self.title, "subtitle": textwrap.wrap(self.caption, 110)}
        fixed = {"width": _SVG_WIDTH} if "width" in self.spec else {}
        spec = {**self.spec, **fixed, "title": title, "background": "white", "padding": 16}
        return str(vl_convert.vegalite_to_svg(spec, vl_version=vega_lite_version()))


def vega_lite_version() -> str:
    """The release of Vega-Lite that the charts are written in, as vl-convert calls it: "6.4"."""
    return str(alt.SCHEMA_VERSION).removeprefix("v").rpartition(".")[0]


def colours(rows: Sequence[Row]) -> dict[str, str]:
    """The colour of each label, the same in every chart; beyond twelve labels they come round again."""
    return {row.label: colour for row, colour in zip(rows, cycle(_PALETTE), strict=False)}


def plots(rows: Sequence[Row], results: Sequence[CellResult], curves: Curves) -> list[Plot]:
    """Every chart for which there are figures; none where no cell finished."""
    done = [(row, row.figures) for row in rows if row.figures is not None]
    if not done:
        return []
    palette = colours(rows)
    reference = next(row.label for row in rows if row.is_reference)
    drawn = [_quality(done, results, palette), _time(done, results, palette), _memory(done, palette)]
    drawn.append(_size(done, palette))
    if any(figures.difference for _, figures in done):
        drawn.insert(1, _difference(done, reference, palette))
    points, window = _loss_points([row.label for row, _ in done], curves)
    if points:
        drawn.append(_loss(points, window, reference, palette))
    return drawn


_Done = Sequence[tuple[Row, Figures]]


def _metric(done: _Done) -> str:
    """What the metric is called."""
    return named(done[0][1].metric).title


def _quality(done: _Done, results: Sequence[CellResult], palette: Mapping[str, str]) -> Plot:
    bars = [
        {
            "label": row.label,
            "value": figures.quality.mean,
            "low": figures.interval.low,
            "high": figures.interval.high,
            "note": f"{table.percent(figures.quality.mean)}  [{table.interval_text(figures.interval)}]",
        }
        for row, figures in done
    ]
    x = alt.X("value:Q", scale=alt.Scale(domain=[0, 1]), axis=_axis(format="%", tickCount=5, title=None))
    interval = _base(bars).mark_rule(strokeWidth=1.5, yOffset=19).encode(x="low:Q", x2="high:Q", y=_rows(bars))
    dots, about_dots = _seed_dots(done, [(cell.label, cell.quality) for cell in results])
    return _plot(
        "quality",
        f"{_metric(done)} on the test split",
        f"{named(done[0][1].metric).meaning} Lines: 95% interval.{about_dots}",
        alt.layer(*_bars(bars, x, palette), interval, *dots),
    )


def _difference(done: _Done, reference: str, palette: Mapping[str, str]) -> Plot:
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
    x = alt.X("value:Q", scale=alt.Scale(domain=[-reach, reach]), axis=_axis(labelExpr=signed, title=None))
    settled = alt.condition("datum.verdict == 'not distinguishable'", alt.value(0), alt.value(1))
    tooltip = ["label:N", "note:N", "verdict:N"]
    base = _base(gaps).encode(y=_rows(gaps), color=_colour(palette), tooltip=tooltip)
    zero = _base([{"value": 0}]).mark_rule(strokeDash=[3, 3], opacity=0.7).encode(x=x)
    lines = base.mark_rule(strokeWidth=3, yOffset=8).encode(x=alt.X("low:Q"), x2="high:Q")
    means = base.mark_point(size=80, strokeWidth=2.5, opacity=1, yOffset=8).encode(
        x=x, fill=_colour(palette, alt.Fill), fillOpacity=settled
    )
    return _plot(
        "difference",
        f"{_metric(done)} against {reference}, in points",
        "Lines: 95% interval, paired on the same test examples. A hollow point, whose line crosses zero, is not "
        "distinguishable from no difference.",
        alt.layer(zero, lines, means, *_words(gaps)),
    )


def _time(done: _Done, results: Sequence[CellResult], palette: Mapping[str, str]) -> Plot:
    unit, length = _unit_of_time(done)
    has_share = any(figures.time_share is not None for _, figures in done)
    bars = [
        {
            "label": row.label,
            "value": figures.train_seconds.mean / length,
            "note": table.seconds(figures.train_seconds.mean)
            + ("" if figures.time_share is None else f"  ({figures.time_share:.0%})"),
        }
        for row, figures in done
    ]
    dots, about_dots = _seed_dots(done, [(cell.label, cell.train_seconds / length) for cell in results])
    about_share = " In brackets: share of full fine-tuning's." if has_share else ""
    x = alt.X("value:Q", scale=alt.Scale(domainMin=0, nice=True), axis=_axis(title=unit))
    return _plot(
        "time",
        "Training time",
        f"Optimiser steps alone: no loading, no evaluation.{about_share}{about_dots}",
        alt.layer(*_bars(bars, x, palette), *dots),
    )


def _memory(done: _Done, palette: Mapping[str, str]) -> Plot:
    largest = max(figures.peak_bytes.mean for _, figures in done)
    unit, length, digits = ("GB", 1e9, 2) if largest >= 1e9 else ("MB", 1e6, 0)
    bars = []
    for row, figures in done:
        baseline, above = figures.baseline_bytes.mean / length, figures.above_baseline_bytes.mean / length
        note = f"{baseline:.{digits}f} + {above:.{digits}f} = {baseline + above:.{digits}f} {unit}"
        bars.append({"label": row.label, "part": "baseline", "from": 0, "value": baseline, "note": note})
        bars.append({"label": row.label, "part": "training", "from": baseline, "value": baseline + above, "note": note})
    x = alt.X("value:Q", scale=alt.Scale(domainMin=0, nice=True), axis=_axis(title=unit))
    shade = alt.Opacity("part:O", scale=alt.Scale(domain=["baseline", "training"], range=[0.35, 1]), legend=None)
    bar, *words = _bars(bars, x, palette)
    return _plot(
        "memory",
        "Peak memory",
        "Pale: the process with its libraries, before the base was loaded. Full: what base, method and training added.",
        alt.layer(bar.encode(x2="from:Q", opacity=shade), *words),
    )


def _size(done: _Done, palette: Mapping[str, str]) -> Plot:
    unit, length = _unit_of_time(done)
    height = max(300, 18 * len(done))
    lows, highs = zip(*((f.interval.low, f.interval.high) for _, f in done), strict=True)
    bottom, top = max(0.0, min(lows) - 0.02), min(1.0, max(highs) + 0.02)
    gap = 17 * (top - bottom) / height
    places = _apart([figures.quality.mean for _, figures in done], gap, bottom + gap / 2, top - gap / 2)
    circles: list[dict[str, Any]] = [
        {
            "label": row.label,
            "time": figures.train_seconds.mean / length,
            "quality": figures.quality.mean,
            "low": figures.interval.low,
            "high": figures.interval.high,
            "trainable": figures.trainable,
            "place": place,
            "note": f"{row.label} · {table.count(figures.trainable)}",
            "adapter": table.size(figures.adapter_bytes.mean),
        }
        for (row, figures), place in zip(done, places, strict=True)
    ]
    longest = max(circle["time"] for circle in circles)
    x = alt.X(
        "time:Q",
        # Room at the right for the names.
        scale=alt.Scale(domain=[0, longest / 0.62], nice=False),
        axis=alt.Axis(title=f"training time, {unit}", values=_ticks(longest)),
    )
    y = alt.Y(
        "quality:Q",
        scale=alt.Scale(domain=[bottom, top], nice=False),
        axis=alt.Axis(format=".0%" if top - bottom > 0.06 else ".1%", tickCount=6, title=f"{_metric(done)} on test"),
    )
    # Area is proportional to the number, from a domain that begins at 0; the largest circle has a radius of 32 pixels.
    area = alt.Size("trainable:Q", scale=alt.Scale(type="linear", domainMin=0, range=[0, math.pi * 32**2]), legend=None)
    tooltip = ["label:N", "time:Q", "quality:Q", "trainable:Q", alt.Tooltip("adapter:N", title="adapter on disk")]
    base = _base(circles).encode(x=x, y=y)
    edge = alt.value({"expr": "width * 0.74"})
    return _plot(
        "size",
        f"What {_metric(done)} costs",
        "Area of a circle: trained parameters, also given by name. A dot marks the middle, so that the smallest show "
        "too. Upright lines: 95% interval.",
        alt.layer(
            base.mark_rule(opacity=0.6).encode(x2=edge, y2="place:Q", color=_colour(palette)),
            base.mark_rule(strokeWidth=1.5, opacity=0.55).encode(y=alt.Y("low:Q"), y2="high:Q"),
            base.mark_circle(opacity=1, fillOpacity=0.35, strokeWidth=1.5).encode(
                size=area, color=_colour(palette), stroke=_colour(palette, alt.Stroke), tooltip=tooltip
            ),
            base.mark_circle(size=10, color=_INK, opacity=1),
            _base(circles)
            .mark_text(align="left", dx=4, baseline="middle", limit=alt.ExprRef("width * 0.24"))
            .encode(x=edge, y="place:Q", text="note:N"),
        ).properties(height=height),
    )


def _loss(points: list[dict[str, Any]], window: int, reference: str, palette: Mapping[str, str]) -> Plot:
    labels = list(dict.fromkeys(point["label"] for point in points))
    # The reference runs through the other panels in grey.
    ghosts = [
        {**point, "label": label, "kind": "reference"}
        for label in labels
        for point in points
        if point["label"] == reference != label and point["kind"] == "train"
    ]
    x = alt.X("epoch:Q", axis=alt.Axis(title="epoch", tickCount=4, grid=False))
    y = alt.Y("loss:Q", scale=alt.Scale(zero=False), axis=alt.Axis(title="loss", tickCount=5))
    base = alt.Chart().encode(x=x, y=y, detail="seed:N")
    chart = (
        alt.layer(
            base.transform_filter("datum.kind == 'reference'").mark_line(strokeWidth=1, stroke=_INK, opacity=0.35),
            base.transform_filter("datum.kind == 'train'").mark_line(strokeWidth=1.75).encode(color=_colour(palette)),
            base.transform_filter("datum.kind == 'validation'")
            .mark_point(size=40, strokeWidth=1.75, opacity=1)
            .encode(color=_colour(palette), tooltip=["label:N", "seed:N", "epoch:Q", "loss:Q"]),
            data=alt.InlineData(values=points + ghosts),
        )
        .properties(width=210, height=140)
        .facet(facet=alt.Facet("label:N", sort=labels, title=None), columns=3, spacing=24)
    )
    smoothing = f"each the mean of {window} steps in a row" if window > 1 else "every step"
    return _plot(
        "loss",
        "Loss",
        f"Lines: training loss, dropout on, {smoothing}; one line for each seed. Rings: validation loss. "
        f"Grey: the training loss of {reference}.",
        chart,
    )


def _loss_points(labels: Iterable[str], curves: Curves, most: int = 40) -> tuple[list[dict[str, Any]], int]:
    """Points to draw and the window they were averaged over.

    Losses of single steps are too noisy to compare. Means of blocks that do not overlap hide nothing else: no lag, no
    special ends. The window is the same for all, so that no curve looks calmer than it is.
    """
    shown = {key: events for key, events in curves.items() if key[0] in set(labels)}
    steps = {key: [event for event in events if isinstance(event, Step)] for key, events in shown.items()}
    window = max(1, math.ceil(max(map(len, steps.values()), default=0) / most))
    points: list[dict[str, Any]] = []
    for label, seed in sorted(shown, key=lambda key: list(labels).index(key[0])):
        origin = {"label": label, "seed": seed}
        of_cell = steps[label, seed]
        for block in (of_cell[start : start + window] for start in range(0, len(of_cell), window)):
            epoch, loss = fmean(step.epoch for step in block), fmean(step.loss for step in block)
            points.append({**origin, "kind": "train", "epoch": epoch, "loss": loss})
        points += [
            {**origin, "kind": "validation", "epoch": event.epoch, "loss": event.loss}
            for event in shown[label, seed]
            if isinstance(event, Evaluated) and event.split == "validation"
        ]
    return [point for point in points if math.isfinite(point["loss"])], window


def _plot(name: str, title: str, caption: str, chart: alt.LayerChart | alt.FacetChart) -> Plot:
    if isinstance(chart, alt.LayerChart):
        chart = chart.properties(width="container", autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
    described = chart.properties(description=f"{title}. {caption} The table below has the same figures.")
    return Plot(name, title, caption, {**described.to_dict(), "config": _CONFIG})


def _base(values: Sequence[Mapping[str, Any]]) -> alt.Chart:
    return alt.Chart(alt.InlineData(values=list(values)))


def _rows(values: Sequence[Mapping[str, Any]]) -> alt.Y:
    """A row for each label in their order, the label written above the mark and not beside it: long names have room."""
    labels = list(dict.fromkeys(value["label"] for value in values))
    return alt.Y("label:N", scale=alt.Scale(domain=labels, paddingInner=0, paddingOuter=0), axis=None)


def _colour(palette: Mapping[str, str], channel: Any = alt.Color) -> Any:
    return channel("label:N", scale=alt.Scale(domain=list(palette), range=list(palette.values())), legend=None)


def _axis(**options: Any) -> alt.Axis:
    """The axis below a chart of rows: the figures are written in it, so lines across it would only be in their way."""
    return alt.Axis(**{"grid": False, "ticks": True, "tickColor": _INK, "tickOpacity": 0.5, "tickCount": 5, **options})


def _unit_of_time(done: _Done) -> tuple[str, int]:
    longest = max(figures.train_seconds.high for _, figures in done)
    return ("seconds", 1) if longest < 180 else ("minutes", 60) if longest < 3 * 3600 else ("hours", 3600)


def _bars(values: Sequence[Mapping[str, Any]], x: alt.X, palette: Mapping[str, str]) -> list[alt.Chart]:
    """A bar for each value from 0, and above each its label at the left and its note at the right."""
    base = _base(values).encode(y=_rows(values), tooltip=["label:N", "note:N"])
    return [base.mark_bar(height=12, yOffset=8).encode(x=x, color=_colour(palette)), *_words(values)]


def _words(values: Sequence[Mapping[str, Any]]) -> list[alt.Chart]:
    firsts = list({value["label"]: value for value in values}.values())
    base = _base(firsts).encode(y=_rows(values), tooltip=["label:N"])
    label = base.mark_text(align="left", baseline="middle", yOffset=-8, limit=alt.ExprRef("width / 2 - 6"))
    note = base.mark_text(align="right", baseline="middle", yOffset=-8, opacity=0.8)
    return [
        label.encode(x=alt.value(0), text="label:N").properties(height=_ROW_HEIGHT * len(firsts)),
        note.encode(x=alt.value("width"), text="note:N"),
    ]


def _seed_dots(done: _Done, values: Sequence[tuple[str, float]]) -> tuple[list[alt.Chart], str]:
    """A dot for each seed of the labels that have several, and the words that explain them."""
    several = {row.label for row, _ in done if len(row.seeds) > 1}
    dots = [{"label": label, "value": value} for label, value in values if label in several]
    if not dots:
        return [], ""
    chart = _base(dots).mark_circle(size=20, color=_INK, opacity=1, yOffset=19)
    order = [{"label": row.label} for row, _ in done]
    return [chart.encode(x="value:Q", y=_rows(order), tooltip=["label:N", "value:Q"])], " Dots: single seeds."


def _apart(values: Sequence[float], gap: float, bottom: float, top: float) -> list[float]:
    """Places for labels, in the order of `values` and as near them as fits with `gap` between any two."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    places = [values[index] for index in order]
    floor = bottom
    for rank, place in enumerate(places):
        places[rank] = max(place, floor)
        floor = places[rank] + gap
    ceiling = top
    for rank in reversed(range(len(places))):
        places[rank] = min(places[rank], ceiling)
        ceiling = places[rank] - gap
    return [place for _, place in sorted(zip(order, places, strict=True))]


def _ticks(longest: float) -> list[float]:
    """Some five round numbers from 0 to `longest`."""
    rough = longest / 5
    power = 10 ** math.floor(math.log10(rough)) if rough > 0 else 1
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    return [step * index for index in range(math.floor(longest / step) + 1)]
