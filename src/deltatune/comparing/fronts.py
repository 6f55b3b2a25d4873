"""What quality costs: each method as a point, and the front of those that nothing beats at their price or below."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from deltatune.comparing import table
from deltatune.comparing.charts import INK, Done, Plot, apart, colour, marks, metric, plot, ticks, unit_of_time
from deltatune.comparing.table import Figures, on_front

_NAMED = 12
"""With more methods than these only those on the front are named in a chart."""
_NAMES = 0.74
"""Where the names begin, as a share of the width; the page sets less where it is narrow."""


@dataclass(frozen=True, slots=True)
class _Cost:
    """A price: how it is called and told, and how its axis looks."""

    name: str
    title: str
    axis: str
    of: Callable[[Figures], float]
    tell: Callable[[float], str]
    length: float = 1
    """The unit of the axis."""
    log: bool = False


def fronts(done: Done, palette: Mapping[str, str]) -> list[Plot]:
    """Quality against training time, peak memory and stored bytes."""
    unit, length = unit_of_time(done)
    in_gb = max(figures.peak_bytes.mean for _, figures in done) >= 1e9
    memory = f"peak memory, {'GB' if in_gb else 'MB'}"
    costs = [
        _Cost("size", "time", f"training time, {unit}", lambda f: f.train_seconds.mean, table.seconds, length),
        _Cost("front-memory", "memory", memory, lambda f: f.peak_bytes.mean, table.size, 1e9 if in_gb else 1e6),
        _Cost("front-bytes", "stored bytes", "bytes on disk", lambda f: f.adapter_bytes.mean, table.size, log=True),
    ]
    return [_front(done, cost, palette) for cost in (costs if len(done) > 1 else costs[:1])]


def _front(done: Done, cost: _Cost, palette: Mapping[str, str]) -> Plot:
    with_circles = cost.name == "size"
    height = max(300, 18 * min(len(done), 2 * _NAMED))
    lows, highs = zip(*((f.interval.low, f.interval.high) for _, f in done), strict=True)
    bottom, top = max(0.0, min(lows) - 0.02), min(1.0, max(highs) + 0.02)
    points = _points(done, cost)
    best = sorted((point for point in points if point["front"]), key=lambda point: point["cost"])
    shown = points if len(points) <= _NAMED else best
    gap = 17 * (top - bottom) / height
    places = apart([point["quality"] for point in shown], gap, bottom + gap / 2, top - gap / 2)
    shown = [{**point, "place": place} for point, place in zip(shown, places, strict=True)]
    x, y = _price(points, cost), _worth(done, bottom, top)
    edge = alt.value({"expr": "width * names"})
    tooltip: list[str | alt.Tooltip] = ["label:N", alt.Tooltip("told:N", title=cost.title), "quality:Q", "trainable:Q"]
    base = marks(points).encode(x=x, y=y, tooltip=tooltip)
    named = marks(shown).encode(x=x, y=y)
    # Area is proportional to the number, from a domain that begins at 0; the largest circle has a radius of 32 pixels.
    area = alt.Size("trainable:Q", scale=alt.Scale(type="linear", domainMin=0, range=[0, math.pi * 32**2]), legend=None)
    circles = base.mark_circle(opacity=1, fillOpacity=0.35, strokeWidth=1.5).encode(
        size=area if with_circles else alt.value(90), color=colour(palette), stroke=colour(palette, alt.Stroke)
    )
    about_circles = (
        "Area of a circle: trained parameters, also given by name. A dot marks the middle, so that the smallest show "
        "too. "
        if with_circles
        else ""
    )
    others = "" if len(shown) == len(points) else " Only the methods on it are named."
    about_front = f"Stepped line: the best to be had for at most so much.{others} " if len(points) > 1 else ""
    return plot(
        cost.name,
        f"{metric(done)} against {cost.title}",
        f"{about_circles}{about_front}Upright lines: 95% interval.",
        alt.layer(
            marks(best).mark_line(interpolate="step-after", strokeWidth=1.5, opacity=0.55, color=INK).encode(x=x, y=y),
            named.mark_rule(opacity=0.5).encode(x2=edge, y2="place:Q", color=colour(palette)),
            base.mark_rule(strokeWidth=1.5, opacity=0.45).encode(y=alt.Y("low:Q"), y2="high:Q"),
            circles,
            base.mark_circle(size=10, color=INK, opacity=1),
            marks(shown)
            .mark_text(align="left", dx=4, baseline="middle", limit=alt.ExprRef("width * (0.98 - names)"))
            .encode(x=edge, y="place:Q", text="note:N", tooltip=tooltip),
        ).properties(height=height),
        (f"{p['label']}: {p['told']}, {table.percent(p['quality'])}{', on the front' * p['front']}" for p in points),
        wide=with_circles,
        parameters={"names": _NAMES if with_circles else 0.6},
    )


def _points(done: Done, cost: _Cost) -> list[dict[str, Any]]:
    prices = [cost.of(figures) for _, figures in done]
    front = on_front([(price, figures.quality.mean) for price, (_, figures) in zip(prices, done, strict=True)])
    return [
        {
            "label": row.label,
            "cost": price / cost.length,
            "told": cost.tell(price),
            "quality": figures.quality.mean,
            "low": figures.interval.low,
            "high": figures.interval.high,
            "trainable": figures.trainable,
            "front": best,
            "note": f"{row.label} · {table.count(figures.trainable) if cost.name == 'size' else cost.tell(price)}",
        }
        for (row, figures), price, best in zip(done, prices, front, strict=True)
    ]


def _price(points: Sequence[Mapping[str, Any]], cost: _Cost) -> alt.X:
    """The axis of the cost, which ends where the names need their room."""
    least, most = (find(point["cost"] for point in points) for find in (min, max))
    if cost.log:
        low = max(1.0, least / 2)
        decades = math.log10(2 * most / low)
        scale = alt.Scale(
            type="log", domainMin=low, domainMax=alt.ExprRef(f"{low} * pow(10, {decades} / (names - 0.06))")
        )
        powers = [10**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(2 * most)) + 1)]
        style = alt.Axis(
            title=cost.axis, values=powers, labelExpr=_BYTES, labelOverlap="greedy", labelSeparation=8, grid=False
        )
    else:
        low = 0.0 if cost.name == "size" else max(0.0, least - (most - least) / 4)
        scale = alt.Scale(
            domainMin=low, domainMax=alt.ExprRef(f"{low} + {most - low or 1} / (names - 0.1)"), nice=False, zero=False
        )
        style = alt.Axis(title=cost.axis, values=ticks(most, low), grid=False)
    return alt.X("cost:Q", scale=scale, axis=style)


_BYTES = (
    "datum.value >= 1e9 ? datum.value / 1e9 + ' GB' : datum.value >= 1e6 ? datum.value / 1e6 + ' MB' : "
    "datum.value >= 1e3 ? datum.value / 1e3 + ' kB' : datum.value + ' B'"
)


def _worth(done: Done, bottom: float, top: float) -> alt.Y:
    return alt.Y(
        "quality:Q",
        scale=alt.Scale(domain=[bottom, top], nice=False),
        axis=alt.Axis(format=".0%" if top - bottom > 0.06 else ".1%", tickCount=6, title=f"{metric(done)} on test"),
    )
