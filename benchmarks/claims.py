"""Runs the taught experiments that fit this machine, and writes what was found to docs/claims.md.

python benchmarks/claims.py NAME… [--runs runs/claims]     runs experiments/claims/NAME.yaml, or goes on with it
python benchmarks/claims.py --page                         prints their part of docs/claims.md

What a run gave stands in experiments/claims/found/NAME.json, with commit, machine and seconds; what that means for the
claim is written by hand at the head of the experiment, after "Found:".
"""

import argparse
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from race.circumstances import circumstances

ROOT = Path(__file__).resolve().parent.parent
CLAIMS = ROOT / "experiments" / "claims"
FOUND = CLAIMS / "found"
INTRODUCTION = """\

## The experiments that are taught

Each is a file in `experiments/claims/`, made to fit two cores: a smaller model, less data. `python benchmarks/claims.py
NAME` runs one. So a claim can show here or not; that it does not show is no proof against it at its own size.
Intervals are 95%, over test examples and seeds; verdicts on pairs are corrected for their number."""


def run(name: str, folder: Path) -> None:
    """Runs an experiment and keeps what it gave."""
    from deltatune import compare, read_experiment
    from deltatune.comparing import statistics, summary, table
    from deltatune.comparing.results import CellResult
    from deltatune.comparing.sharing import News

    def watch(_: Any, news: News) -> None:
        if isinstance(news, CellResult):
            print(f"{name}: {news.label} {news.seed}: {news.metric} {news.quality:.3f}", flush=True)

    done = compare(read_experiment(CLAIMS / f"{name}.yaml"), folder / name, watch)
    cells = [*done.results, *done.smaller]
    order = list(dict.fromkeys((cell.label, cell.train_examples) for cell in cells))
    lines = [_line([cell for cell in cells if (cell.label, cell.train_examples) == key]) for key in order]
    pairs = [
        {
            "methods": [one.a, one.b],
            "difference": one.difference.value,
            "low": one.difference.interval.low,
            "high": one.difference.interval.high,
            "verdict": one.difference.verdict,
        }
        for one in statistics.pairs(done.results)
    ]
    kept = {
        **circumstances(),
        "failed": [f"{one.label} {one.seed}: {one.reason}" for one in done.failed],
        "findings": summary.findings(table.rows(done.results), done.results),
        "lines": lines,
        "pairs": pairs,
    }
    FOUND.mkdir(exist_ok=True)
    (FOUND / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def _line(cells: Sequence[Any]) -> dict[str, Any]:
    """What one label gave over its seeds, on one number of training examples."""
    from deltatune.comparing.statistics import mean_interval

    first, interval = cells[0], mean_interval(cells)
    figures: dict[str, float] = {
        first.metric: fmean(cell.quality for cell in cells),
        "low": interval.low,
        "high": interval.high,
        "loss": fmean(cell.test["loss"] for cell in cells),
        "train_loss": fmean(cell.train_loss for cell in cells),
        "seconds": fmean(cell.train_seconds for cell in cells),
        "peak_bytes": fmean(cell.peak_bytes for cell in cells),
    }
    if first.plain_text:
        figures["forgotten"] = fmean(cell.plain_text[1] - cell.plain_text[0] for cell in cells)
    if first.drift is not None:
        figures["drift"] = fmean(cell.drift for cell in cells)
    for kind in ("base", "adapted", "merged"):
        times = [getattr(cell.latency, kind) for cell in cells if cell.latency]
        if times and None not in times:
            figures[f"latency_{kind}"] = fmean(times)
    return {
        "label": first.label,
        "metric": first.metric,
        "train_examples": first.train_examples,
        "seeds": len(cells),
        "trainable": first.trainable,
        **figures,
    }


def page() -> str:
    """The part of docs/claims.md about experiments."""
    parts = [INTRODUCTION]
    for path in sorted(CLAIMS.glob("*.yaml")):
        claimed, tested, verdict = _comment(path)
        found = FOUND / f"{path.stem}.json"
        parts += [f"### `{path.stem}`", f"**Claimed:** {claimed}", f"**Tested here:** {tested}"]
        if not found.exists():
            parts.append("**Not run yet.**")
            continue
        result = json.loads(found.read_text(encoding="utf-8"))
        parts += [f"**Found:** {verdict}", _table(result["lines"])]
        machine, threads = result["machine"], result["machine"]["threads"]
        minutes = sum(line["seconds"] * line["seeds"] for line in result["lines"]) / 60
        parts.append(
            f"`{result['command']}`, commit {result['commit'][:10]}, {result['date'][:10]}, {machine['processor']}, "
            f"{threads} thread{'s' if threads > 1 else ''}, {minutes:.0f} min of training."
        )
        parts += [f"Failed: {reason}" for reason in result["failed"]]
    return "\n\n".join(parts) + "\n"


def _comment(path: Path) -> tuple[str, str, str]:
    """What the head of an experiment says: the claim, how it is tested, and what that came to, where it was run."""
    lines = [
        line.removeprefix("#").strip() for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#"
    ]
    claimed, _, rest = " ".join(lines).removeprefix("Claimed:").partition("Tested here")
    tested, _, verdict = rest.lstrip(" :").partition("Found:")
    return claimed.strip(), tested.strip(), verdict.strip()


def _table(lines: Sequence[dict[str, Any]]) -> str:
    metric = lines[0]["metric"]
    columns = [
        "Method",
        "Examples",
        "Seeds",
        f"Test {metric} (95%)",
        "Test loss",
        "Training loss",
        "Training, s",
        "Peak, MB",
    ]
    others = {
        "forgotten": ("Loss on plain text", 1, "+.3f"), "drift": ("Drift", 1, ".3f"),
        "latency_base": ("Base, ms", 1000, ".1f"), "latency_adapted": ("Adapted, ms", 1000, ".1f"),
        "latency_merged": ("Merged, ms", 1000, ".1f"),
    }  # fmt: skip
    there = [key for key in others if any(key in line for line in lines)]
    columns += [others[key][0] for key in there]
    rows = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for _, group in groupby(lines, key=lambda line: line["train_examples"]):
        for line in group:
            values = [
                f"`{line['label']}`",
                f"{line['train_examples']:,}",
                str(line["seeds"]),
                f"{line[metric]:.3f} ({line['low']:.3f} to {line['high']:.3f})",
                f"{line['loss']:.3f}",
                f"{line['train_loss']:.3f}",
                f"{line['seconds']:.1f}",
                f"{line['peak_bytes'] / 1e6:,.0f}",
                *(f"{others[key][1] * line[key]:{others[key][2]}}" if key in line else "–" for key in there),
            ]
            rows.append("| " + " | ".join(values) + " |")
    return "\n".join(rows)


def main() -> None:
    """Runs what is named, or prints the page."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("names", nargs="*")
    options.add_argument("--runs", type=Path, default=Path("runs/claims"))
    options.add_argument("--page", action="store_true")
    given = options.parse_args()
    for name in given.names:
        run(name, given.runs)
    if given.page:
        print(page(), end="")


if __name__ == "__main__":
    main()
