"""report.html: the comparison as one page that opens anywhere, offline, with nothing beside it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deltatune.comparing import table
from deltatune.comparing.quality import named
from deltatune.comparing.results import CellResult, FailedCell
from deltatune.comparing.table import Figures, Row, Spread
from deltatune.errors import UserError
from deltatune.files import new_folder, write_text

if TYPE_CHECKING:
    from deltatune.comparing.plots import Curves


def check_installed() -> None:
    """Raises UserError where a library that reports need is missing. Ask before a long run, not after it."""
    missing = [name for name in ("altair", "vl_convert", "jinja2") if find_spec(name) is None]
    if missing:
        raise UserError(f"a report needs {' and '.join(missing)}", "pip install 'deltatune[report]'")


def write_report(
    folder: Path,
    experiment: dict[str, Any],
    results: Sequence[CellResult],
    failed: Sequence[FailedCell],
    curves: "Curves",
) -> Path:
    """Writes report.html and plots/*.svg into `folder` and returns the path of the page.

    `experiment` is shown as it is; its `base` and `data` (a name, or a mapping with a `name`) make the title. `curves`
    holds the events of each cell by label and seed. Raises UserError where the `report` extra is not installed or the
    disk refuses.
    """
    check_installed()
    from jinja2 import Environment, StrictUndefined

    from deltatune.comparing import plots

    rows = table.rows(results, failed)
    shown = columns(rows)
    drawn = plots.plots(rows, results, curves)
    with new_folder(folder / "plots") as pictures:
        for plot in drawn:
            write_text(pictures / f"{plot.name}.svg", plot.svg())

    # Labels, options and reasons come from people and processes: everything is escaped, always.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        title=f"{_name(experiment, 'base')} on {_name(experiment, 'data')}",
        summary=summary(rows),
        caution=table.what_intervals_cover(rows),
        rows=rows,
        columns=shown,
        groups={group: list(several) for group, several in groupby(shown, key=lambda column: column.group)},
        colours=plots.colours(rows),
        plots=drawn,
        charts={plot.name: plot.spec for plot in drawn},
        drawing=_drawing(plots.vega_lite_version()) if drawn else "",
        experiment=experiment,
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def summary(rows: Sequence[Row]) -> str:
    """What came out, in two or three plain sentences made from the figures."""
    done = [(row, row.figures) for row in rows if row.figures is not None]
    reference = next((pair for pair in done if pair[0].is_reference), None)
    compared = [(row, figures) for row, figures in done if figures.difference is not None]
    failures = sum(len(row.failures) for row in rows)
    sentences = []
    if reference is None:
        sentences.append("No run finished.")
    elif not compared:
        row, figures = reference
        reached = f"{table.percent(figures.quality.mean)} [{table.interval_text(figures.interval)}]"
        sentences.append(
            f"{row.label} reaches {reached} test {named(figures.metric).word}; there is nothing to compare it with."
        )
    else:
        best = max(compared, key=lambda pair: pair[1].quality.mean)
        sentences.append(_headline(*best, _called(reference[0])))
        others = [figures for row, figures in compared if row is not best[0]]
        if others:
            sentences.append(_others(others, _called(reference[0])))
    if failures:
        runs = failures + sum(len(row.seeds) for row in rows)
        sentences.append(f"{failures} of {runs} runs failed; the reasons are below.")
    return " ".join(sentences)


def _headline(row: Row, figures: Figures, reference: str) -> str:
    gap = figures.difference
    assert gap is not None
    time = f", in {figures.time_share:.0%} of the time of full fine-tuning" if figures.time_share is not None else ""
    interval = table.points_interval(gap.interval)
    verdict = (
        f"the difference in {named(figures.metric).word} to {reference}, {table.points(gap.value)} points {interval}, "
        "is not distinguishable from zero"
        if gap.verdict == "not distinguishable"
        else f"that is {gap.verdict} than {reference}, by {table.points(gap.value)} points {interval}"
    )
    return (
        f"{row.label} reaches {table.percent(figures.quality.mean)} test {named(figures.metric).word} with "
        f"{table.small_percent(figures.trainable_share)} of the parameters trained{time}; {verdict}."
    )


def _others(others: Sequence[Figures], reference: str) -> str:
    verdicts = [figures.difference.verdict for figures in others if figures.difference]
    words = {
        "better": f"better than {reference}",
        "not distinguishable": "not distinguishable from it",
        "worse": "worse",
    }
    found = {verdict: verdicts.count(verdict) for verdict in words if verdict in verdicts}
    if len(found) == 1:
        subject = "The other method is" if len(others) == 1 else f"The {len(others)} other methods are"
        return f"{subject} {words[verdicts[0]]}."
    parts = [f"{number} {'is' if number == 1 else 'are'} {words[verdict]}" for verdict, number in found.items()]
    return f"Of the {len(others)} other methods {', '.join(parts[:-1])} and {parts[-1]}."


def _called(row: Row) -> str:
    return "full fine-tuning" if row.method == "full" else row.label


def _name(experiment: dict[str, Any], key: str) -> str:
    value = experiment.get(key)
    return str(value.get("name", key) if isinstance(value, dict) else value or key)


@cache
def _drawing(vega_lite: str) -> str:
    """The JavaScript of Vega with a few lines that draw every chart of the page in its place."""
    import vl_convert

    script = vl_convert.javascript_bundle(_DRAW, vl_version=vega_lite)
    # Nothing in a script may look like its end.
    return str(script).replace("</script", r"<\/script")


_DRAW = """
const charts = JSON.parse(document.getElementById("charts").textContent);
for (const [name, spec] of Object.entries(charts)) {
  const box = document.getElementById("plot-" + name);
  if (spec.columns) {
    spec.columns = Math.max(1, Math.floor(box.clientWidth / 240));
    spec.spec.width = Math.floor((box.clientWidth - 40) / spec.columns) - spec.spacing;
  }
  vegaEmbed(box, spec, {mode: "vega-lite", renderer: "svg", actions: false});
}
"""


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
    figures = next((row.figures for row in rows if row.figures), None)
    return (*(_quality(figures) if figures else ()), *_COST)


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
        f"{metric.title} minus the reference's, in percentage points; below it the 95% interval (paired bootstrap).",
        lambda figures: figures.difference.value if figures.difference else None,
        table.points,
        _gap_interval,
    )
    yield Column(
        "Quality",
        "Verdict",
        "Better or worse than the reference where that interval leaves out 0; else not distinguishable.",
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
