"""report.html: the comparison as one page that opens anywhere, offline, with nothing beside it."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from deltatune.comparing import table
from deltatune.comparing.columns import columns
from deltatune.comparing.provenance import different_code
from deltatune.comparing.records import records
from deltatune.comparing.results import CellResult, FailedCell
from deltatune.comparing.search import read_searches
from deltatune.comparing.statistics import Difference, Pair, between, pairs, power
from deltatune.comparing.summary import findings, matched, summary, tiles
from deltatune.errors import UserError
from deltatune.files import new_folder, write_bytes, write_text

if TYPE_CHECKING:
    from deltatune.comparing.curves import Curves


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
    smaller: Sequence[CellResult] = (),
) -> Path:
    """Writes report.html and each plot as SVG and PNG into `folder` and returns the path of the page.

    `experiment` is shown as it is; its `base` and `data` (a name, or a mapping with a `name`) make the title. `curves`
    holds the events of each cell by label and seed; `smaller` the cells that were trained on fewer examples, for
    learning curves. Searches are those of `folder`. Raises UserError where the `report` extra is not installed or the
    disk refuses.
    """
    check_installed()
    from jinja2 import Environment, StrictUndefined

    from deltatune.comparing import charts, plots

    rows = table.rows(results, failed)
    found = pairs(results)
    shown = columns(rows)
    drawn = plots.plots(rows, results, curves, smaller)
    with new_folder(folder / "plots") as pictures:
        for plot in drawn:
            svg, png = plot.pictures()
            write_text(pictures / f"{plot.name}.svg", svg)
            write_bytes(pictures / f"{plot.name}.png", png)

    # Labels, options and reasons come from people and processes: everything is escaped, always.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    best, figures_of_best = tiles(rows)
    page = environment.from_string(_beside("report.html.j2")).render(
        title=f"{_name(experiment, 'base')} on {_name(experiment, 'data')}",
        style=_beside("report.css"),
        script=_beside("report.js"),
        summary=summary(rows),
        findings=findings(rows, results, power(found, len(results[0].test_values)) if results else None),
        matched=matched(experiment),
        pairs=matrix(rows, found),
        searches=read_searches(folder),
        points=table.points,
        points_interval=table.points_interval,
        seconds=table.seconds,
        best=best,
        tiles=figures_of_best,
        cautions=[text for text in (different_code([*results, *smaller]), table.what_intervals_cover(rows)) if text],
        rows=rows,
        columns=shown,
        groups={group: list(several) for group, several in groupby(shown, key=lambda column: column.group)},
        colours=charts.colours(rows),
        plots=drawn,
        charts={plot.name: plot.spec for plot in drawn},
        drawing=_drawing(charts.vega_lite_version()) if drawn else "",
        runs=list(_runs(experiment, results, failed)),
        facts=_facts(experiment),
        version=version("deltatune"),
        again=yaml.safe_dump(again(experiment), sort_keys=False, allow_unicode=True, width=100),
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def matrix(rows: Sequence[table.Row], found: Sequence[Pair]) -> list[tuple[table.Row, list[Difference | None]]]:
    """Each method against each other, the best first; none for fewer than three, whose pairs the table has."""
    best_first = sorted(
        (row for row in rows if row.figures), key=lambda row: -row.figures.quality.mean if row.figures else 0
    )
    if len(best_first) < 3:
        return []
    return [(row, [between(found, row.label, other.label) for other in best_first]) for row in best_first]


def again(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """The experiment as a file that runs the same again: without what was resolved, the base at its revision."""
    plain = {key: value for key, value in experiment.items() if key != "resolved"}
    base = experiment.get("resolved", {}).get("base", {})
    if len(revision := str(base.get("revision", ""))) == 40 and "@" not in str(plain.get("base", "@")):
        plain["base"] = f"{plain['base']}@{revision}"
    return plain


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _name(experiment: dict[str, Any], key: str) -> str:
    value = experiment.get(key)
    return str(value.get("name", key) if isinstance(value, dict) else value or key)


def _facts(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """What was run, by the headings of the page; what each method had stands with its runs."""
    resolved = experiment.get("resolved", {})
    parts = {
        **{key: value for key, value in experiment.items() if key not in ("resolved", "methods")},
        **{key: value for key, value in resolved.items() if key not in ("targets", "learning rates", "cells")},
    }
    for key in ("base", "data"):
        if isinstance(own := experiment.get(key), Mapping) and isinstance(found := resolved.get(key), Mapping):
            parts[key] = {**found, "asked for": {name: value for name, value in own.items() if value}}
    return {key: value for key, value in parts.items() if value not in ("", None, [], (), {})}


def _runs(
    experiment: Mapping[str, Any], results: Sequence[CellResult], failed: Sequence[FailedCell]
) -> Iterator[dict[str, Any]]:
    """Every run with its settings and its figures, as results.csv has them but rounded."""
    resolved = experiment.get("resolved", {})
    chosen = {choice.get("label"): choice for choice in experiment.get("methods", []) if isinstance(choice, Mapping)}
    every: list[CellResult | FailedCell] = [*results, *failed]
    for cell, record in zip(every, records(results, failed), strict=True):
        figures = {
            name: value
            for name, value in record.items()
            if name not in ("label", "method", "options", "seed", "status")
        }
        yield {
            "label": cell.label,
            "seed": cell.seed,
            "status": record["status"],
            "told": f"{table.percent(cell.quality)}, {table.seconds(cell.train_seconds)}"
            if isinstance(cell, CellResult)
            else "failed",
            "settings": {
                "method": cell.method,
                **cell.options,
                "learning rate": resolved.get("learning rates", {}).get(cell.label),
                "storage": chosen.get(cell.label, {}).get("storage") or "as the base has it",
            },
            "targets": resolved.get("targets", {}).get(cell.label, ""),
            "figures": {name: _rounded(value) for name, value in figures.items() if value not in (None, "")},
        }


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


@cache
def _drawing(vega_lite: str) -> str:
    """The JavaScript of Vega with a few lines that draw every chart of the page in its place."""
    import vl_convert

    script = vl_convert.javascript_bundle(_beside("charts.js"), vl_version=vega_lite)
    # Nothing in a script may look like its end.
    return str(script).replace("</script", r"<\/script")
