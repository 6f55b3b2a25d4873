"""Charts of what changes along a line: the loss over the epochs, and the metric over the sizes of a method."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

import altair as alt

from deltatune.comparing import table
from deltatune.comparing.charts import INK, Done, Plot, colour, marks, metric, plot
from deltatune.comparing.results import CellResult
from deltatune.comparing.statistics import mean_interval
from deltatune.comparing.table import Figures, Row
from deltatune.training.events import Evaluated, Event, Step

Curves = Mapping[tuple[str, int], Sequence[Event]]
"""The events of each cell, by label and seed."""

_LEAST = 3
"""Points that make a curve."""


def sweeps(done: Done, palette: Mapping[str, str]) -> list[Plot]:
    """The metric against a size, such as the rank, for each method that ran with three sizes of it or more."""
    return [_sweep(done, knob, members, palette) for knob, members in _swept(done)]


def _swept(done: Done) -> Iterator[tuple[str, list[list[tuple[float, Row, Figures]]]]]:
    """A hyperparameter that several rows of a method differ in, with these rows as curves.

    Rows of one curve share what is no number; a number that goes along with another (alpha with the rank) may differ.
    """
    for _, of_method in groupby(sorted(done, key=lambda pair: pair[0].method), key=lambda pair: pair[0].method):
        members = list(of_method)
        options = members[0][0].options
        numbers = [name for name in options if all(_is_number(row.options.get(name)) for row, _ in members)]
        knob = next((name for name in numbers if len({row.options[name] for row, _ in members}) >= _LEAST), None)
        if knob is None:
            continue
        groups: dict[str, list[tuple[float, Row, Figures]]] = {}
        for row, figures in members:
            shared = repr({name: value for name, value in row.options.items() if name not in numbers})
            groups.setdefault(shared, []).append((row.options[knob], row, figures))
        curves = [
            sorted(group, key=lambda member: member[0])
            for group in groups.values()
            if len({value for value, *_ in group}) == len(group) >= _LEAST
        ]
        if curves:
            yield knob, curves


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sweep(
    done: Done, knob: str, curves: Sequence[Sequence[tuple[float, Row, Figures]]], palette: Mapping[str, str]
) -> Plot:
    points = [
        {
            "label": row.label,
            "curve": index,
            "size": value,
            "quality": figures.quality.mean,
            "low": figures.interval.low,
            "high": figures.interval.high,
            "told": f"{table.percent(figures.quality.mean)} [{table.interval_text(figures.interval)}]",
        }
        for index, curve in enumerate(curves)
        for value, row, figures in curve
    ]
    method, word = curves[0][0][1].method, knob.replace("_", " ")
    sizes = sorted({float(value) for curve in curves for value, *_ in curve})
    doubling = sizes[0] > 0 and sizes[-1] / sizes[0] >= 8
    scale = alt.Scale(type="log", base=2, padding=16) if doubling else alt.Scale(zero=False, padding=16)
    x = alt.X("size:Q", scale=scale, axis=alt.Axis(title=word, values=sizes, format="~g", grid=False))
    y = alt.Y("quality:Q", scale=alt.Scale(zero=False), axis=alt.Axis(format=".1%", tickCount=6, title=metric(done)))
    tooltip: list[str | alt.Tooltip] = ["label:N", alt.Tooltip("told:N", title=metric(done))]
    base = marks(points).encode(x=x, y=y, tooltip=tooltip)
    return plot(
        f"sweep-{method}-{knob}",
        f"{metric(done)} against the {word} of {method}",
        f"{'One line for each choice of its other settings. ' * (len(curves) > 1)}Upright lines: 95% interval.",
        alt.layer(
            base.mark_line(strokeWidth=1.5, color=INK, opacity=0.6).encode(detail="curve:N"),
            base.mark_rule(strokeWidth=1.5, opacity=0.45).encode(y=alt.Y("low:Q"), y2="high:Q"),
            base.mark_circle(size=90, opacity=1).encode(color=colour(palette)),
        ).properties(height=260),
        (f"{point['label']}: {point['told']}" for point in points),
    )


def learning(done: Done, results: Sequence[CellResult], palette: Mapping[str, str]) -> list[Plot]:
    """The metric against the number of training examples, where a comparison has several."""
    groups: dict[tuple[str, int], list[CellResult]] = {}
    for cell in sorted(results, key=lambda cell: (list(palette).index(cell.label), cell.train_examples)):
        groups.setdefault((cell.label, cell.train_examples), []).append(cell)
    points: list[dict[str, Any]] = []
    for (label, examples), cells in groups.items():
        quality, interval = fmean(cell.quality for cell in cells), mean_interval(cells)
        told = f"{table.percent(quality)} [{table.interval_text(interval)}]"
        point = {"label": label, "examples": examples, "quality": quality, "told": told}
        points.append({**point, "low": interval.low, "high": interval.high})
    sizes = sorted({int(point["examples"]) for point in points})
    if len(sizes) < 2:
        return []
    x = alt.X(
        "examples:Q",
        scale=alt.Scale(type="log", padding=16),
        axis=alt.Axis(title="training examples", values=sizes, format=",d", grid=False),
    )
    y = alt.Y("quality:Q", scale=alt.Scale(zero=False), axis=alt.Axis(format=".1%", tickCount=6, title=metric(done)))
    base = marks(points).encode(
        x=x, y=y, color=colour(palette), tooltip=["label:N", "examples:Q", alt.Tooltip("told:N", title=metric(done))]
    )
    ends = [point for point in points if point["examples"] == sizes[-1]]
    return [
        plot(
            "learning",
            f"{metric(done)} with less data",
            "One line for each method, named where it has the most examples. Upright lines: 95% interval.",
            alt.layer(
                base.mark_line(strokeWidth=1.75),
                base.mark_rule(strokeWidth=1.5, opacity=0.4).encode(y=alt.Y("low:Q"), y2="high:Q"),
                base.mark_circle(size=70, opacity=1),
                marks(ends).mark_text(align="right", dy=-10, fontSize=11).encode(x=x, y=y, text="label:N"),
            ).properties(height=320),
            (f"{point['label']}, {point['examples']} examples: {point['told']}" for point in points),
            wide=True,
        )
    ]


def losses(labels: Sequence[str], curves: Curves, reference: str, palette: Mapping[str, str]) -> list[Plot]:
    """The losses of training and validation, a panel for each label; nothing where no step was noted."""
    points, window = _loss_points(labels, curves)
    if not points:
        return []
    shown = list(dict.fromkeys(point["label"] for point in points))
    # The reference runs through the other panels in grey.
    ghosts = [
        {**point, "label": label, "kind": "reference"}
        for label in shown
        for point in points
        if point["label"] == reference != label and point["kind"] == "train"
    ]
    x = alt.X("epoch:Q", axis=alt.Axis(title="epoch", tickCount=4, grid=False))
    y = alt.Y("loss:Q", scale=alt.Scale(zero=False), axis=alt.Axis(title="loss", tickCount=5))
    base = alt.Chart().encode(x=x, y=y, detail="seed:N")
    chart = (
        alt.layer(
            base.transform_filter("datum.kind == 'reference'").mark_line(strokeWidth=1, stroke=INK, opacity=0.35),
            base.transform_filter("datum.kind == 'train'").mark_line(strokeWidth=1.75).encode(color=colour(palette)),
            base.transform_filter("datum.kind == 'validation'")
            .mark_point(size=40, strokeWidth=1.75, opacity=1)
            .encode(color=colour(palette), tooltip=["label:N", "seed:N", "epoch:Q", "loss:Q"]),
            data=alt.InlineData(values=points + ghosts),
        )
        .properties(width=210, height=140)
        .facet(facet=alt.Facet("label:N", sort=shown, title=None), columns=3, spacing=24)
    )
    smoothing = f"each the mean of {window} steps in a row" if window > 1 else "every step"
    return [
        plot(
            "loss",
            "Loss",
            f"Lines: training loss, dropout on, {smoothing}; one line for each seed. Rings: validation loss. "
            f"Grey: the training loss of {reference}.",
            chart,
            _from_to(points),
            wide=True,
        )
    ]


def _from_to(points: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for (label, seed, kind), members in groupby(
        points, key=lambda point: (point["label"], point["seed"], point["kind"])
    ):
        first, *_, last = (*members,) * 2
        yield f"{label}, seed {seed}, {kind}: from {first['loss']:.3f} to {last['loss']:.3f}"


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
