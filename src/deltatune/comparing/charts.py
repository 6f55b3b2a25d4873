"""What the charts are made of: a chart with its words, the colours, rows with bars, and places for names.

Words and axes take the colour of the page's text, so that one chart serves light and dark. Every mark has its method
written beside it: colour helps the eye, and nothing hangs on it.
"""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import altair as alt
import vl_convert

from deltatune.comparing.quality import named
from deltatune.comparing.table import Figures, Row

Done = Sequence[tuple[Row, Figures]]
"""The rows that have figures."""

# Searched for, not picked: any two are at least 0.10 apart in OKLab, also as protanopes and deuteranopes see them
# (Machado et al. 2009), and each has a contrast of 2.2 or more on the page's light and dark ground.
_PALETTE = (
    *("#005aa5", "#ff871e", "#00c396", "#4bb4ff", "#964b00", "#5a0fff"),
    *("#1ea5b4", "#a56969", "#d2690f", "#5a78b4", "#784b5a", "#5a78ff"),
)
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif"
INK = "currentColor"
_ROW_HEIGHT = 42
_SVG_WIDTH = 720
_CONFIG = {
    "background": "transparent",
    "padding": {"left": 0, "right": 0, "top": 5, "bottom": 5},
    "font": _FONT,
    "view": {"stroke": None},
    "axis": {
        **{"domain": False, "ticks": False, "labelPadding": 6, "titlePadding": 8, "titleFontWeight": "normal"},
        **{"labelFontSize": 11, "titleFontSize": 11, "labelColor": INK, "titleColor": INK, "gridColor": INK},
        **{"labelOpacity": 0.75, "titleOpacity": 0.75, "gridOpacity": 0.13},
    },
    "text": {"color": INK, "fontSize": 12},
    "rule": {"color": INK},
    "title": {
        **{"anchor": "start", "frame": "bounds", "offset": 16, "color": INK, "subtitleColor": INK},
        **{"fontSize": 15, "fontWeight": 600, "subtitleFontSize": 12, "subtitlePadding": 6, "subtitleLineHeight": 16},
    },
    "header": {"title": None, "labelColor": INK, "labelFontSize": 12, "labelAnchor": "start", "labelLimit": 180},
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
    alternative: str
    """What it shows, in words, for those who do not see it."""
    wide: bool = False
    """Whether it needs the width of the page."""

    def pictures(self) -> tuple[str, bytes]:
        """The chart as a picture that stands alone, with title and caption: SVG, and PNG of twice the page's pixels."""
        title = {"text": self.title, "subtitle": textwrap.wrap(self.caption, 110)}
        fixed = {"width": _SVG_WIDTH} if "width" in self.spec else {}
        spec = {**self.spec, **fixed, "title": title, "background": "white", "padding": 16}
        svg = str(vl_convert.vegalite_to_svg(spec, vl_version=vega_lite_version()))
        return svg, bytes(vl_convert.svg_to_png(svg, scale=2))


def vega_lite_version() -> str:
    """The release of Vega-Lite that the charts are written in, as vl-convert calls it: "6.4"."""
    return str(alt.SCHEMA_VERSION).removeprefix("v").rpartition(".")[0]


def colours(rows: Sequence[Row]) -> dict[str, str]:
    """The colour of each label, the same in every chart; beyond twelve labels they come round again."""
    return {row.label: colour for row, colour in zip(rows, cycle(_PALETTE), strict=False)}


def metric(done: Done) -> str:
    """What the metric is called."""
    return named(done[0][1].metric).title


def plot(
    name: str,
    title: str,
    caption: str,
    chart: alt.LayerChart | alt.FacetChart,
    facts: Iterable[str],
    *,
    wide: bool = False,
    parameters: Mapping[str, Any] | None = None,
) -> Plot:
    """The chart with its words. `parameters` are variables of its expressions, with the values to begin with."""
    if isinstance(chart, alt.LayerChart):
        chart = chart.properties(width="container", autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
    spec = {**chart.to_dict(), "config": _CONFIG}
    if parameters:
        spec["params"] = [{"name": key, "value": value} for key, value in parameters.items()]
    return Plot(name, title, caption, spec, f"{title}. {'; '.join(facts)}.", wide)


def marks(values: Sequence[Mapping[str, Any]]) -> alt.Chart:
    """A chart of these values that has no marks yet."""
    return alt.Chart(alt.InlineData(values=list(values)))


def row_axis(values: Sequence[Mapping[str, Any]]) -> alt.Y:
    """A row for each label in their order, the label written above the mark and not beside it: long names have room."""
    labels = list(dict.fromkeys(value["label"] for value in values))
    return alt.Y("label:N", scale=alt.Scale(domain=labels, paddingInner=0, paddingOuter=0), axis=None)


def colour(palette: Mapping[str, str], channel: Any = alt.Color) -> Any:
    """The colour of a mark's label."""
    return channel("label:N", scale=alt.Scale(domain=list(palette), range=list(palette.values())), legend=None)


def axis_below(**options: Any) -> alt.Axis:
    """The axis below a chart of rows: the figures are written in it, so lines across it would only be in their way."""
    return alt.Axis(**{"grid": False, "ticks": True, "tickColor": INK, "tickOpacity": 0.5, "tickCount": 5, **options})


def unit_of_time(done: Done) -> tuple[str, int]:
    """What the training times are shown in, and its seconds."""
    longest = max(figures.train_seconds.high for _, figures in done)
    return ("seconds", 1) if longest < 180 else ("minutes", 60) if longest < 3 * 3600 else ("hours", 3600)


def bars(values: Sequence[Mapping[str, Any]], x: alt.X, palette: Mapping[str, str]) -> list[alt.Chart]:
    """A bar for each value from 0, and above each its label at the left and its note at the right."""
    chart = marks(values).encode(y=row_axis(values), tooltip=["label:N", "note:N"])
    return [chart.mark_bar(height=12, yOffset=8).encode(x=x, color=colour(palette)), *names_and_notes(values)]


def names_and_notes(values: Sequence[Mapping[str, Any]]) -> list[alt.Chart]:
    """The words above each row: its label at the left, its note at the right."""
    firsts = list({value["label"]: value for value in values}.values())
    chart = marks(firsts).encode(y=row_axis(values), tooltip=["label:N"])
    label = chart.mark_text(align="left", baseline="middle", yOffset=-8, limit=alt.ExprRef("width / 2 - 6"))
    note = chart.mark_text(align="right", baseline="middle", yOffset=-8, opacity=0.8)
    return [
        label.encode(x=alt.value(0), text="label:N").properties(height=_ROW_HEIGHT * len(firsts)),
        note.encode(x=alt.value("width"), text="note:N"),
    ]


def seed_dots(done: Done, values: Sequence[tuple[str, float]]) -> tuple[list[alt.Chart], str]:
    """A dot for each seed of the labels that have several, and the words that explain them."""
    several = {row.label for row, _ in done if len(row.seeds) > 1}
    dots = [{"label": label, "value": value} for label, value in values if label in several]
    if not dots:
        return [], ""
    chart = marks(dots).mark_circle(size=20, color=INK, opacity=1, yOffset=19)
    order = [{"label": row.label} for row, _ in done]
    return [chart.encode(x="value:Q", y=row_axis(order), tooltip=["label:N", "value:Q"])], " Dots: single seeds."


def apart(values: Sequence[float], gap: float, bottom: float, top: float) -> list[float]:
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


def ticks(longest: float, start: float = 0) -> list[float]:
    """Some five round numbers from `start` to `longest`."""
    rough = (longest - start) / 5
    power = 10 ** math.floor(math.log10(rough)) if rough > 0 else 1
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    return [step * index for index in range(math.ceil(start / step), math.floor(longest / step) + 1)]
