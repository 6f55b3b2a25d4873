"""What came out of a comparison in plain sentences, made from the figures."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltatune.comparing import table
from deltatune.comparing.quality import named
from deltatune.comparing.results import CellResult
from deltatune.comparing.statistics import Power
from deltatune.comparing.table import Figures, Row, on_front


@dataclass(frozen=True, slots=True)
class Tile:
    """One figure of the best method, and what it is held against."""

    value: str
    what: str
    beside: str


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
    if reference is not None:
        sentences += _about_reference(reference[0], rows)
    if failures:
        runs = failures + sum(len(row.seeds) for row in rows)
        sentences.append(f"{failures} of {runs} runs failed; the reasons are below.")
    return " ".join(sentences)


def _about_reference(reference: Row, rows: Sequence[Row]) -> Iterator[str]:
    """What must be known of the method that the others are held against, where it or full fine-tuning failed."""
    if reference.failures:
        seeds = f"seed{'s' if len(reference.seeds) > 1 else ''} {', '.join(map(str, reference.seeds))}"
        yield f"{reference.label} failed in part: differences to it are made from {seeds} alone."
    elif reference.method != "full" and any(row.method == "full" for row in rows):
        yield f"Full fine-tuning failed with every seed: the others are held against {reference.label}."


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


def findings(rows: Sequence[Row], results: Sequence[CellResult], strength: Power | None = None) -> dict[str, str]:
    """The summary's parts in more words: what was compared, what came out better and worse, what it cost."""
    done = [(row, row.figures) for row in rows if row.figures is not None]
    if not done:
        return {}
    found = {"Compared": _compared(done, results)}
    reference = next(row for row, _ in done if row.is_reference)
    for verdict, title in (
        ("better", f"Better than {_called(reference)}"),
        ("not distinguishable", f"Not distinguishable from {_called(reference)}"),
        ("worse", f"Worse than {_called(reference)}"),
    ):
        labels = [row.label for row, figures in done if figures.difference and figures.difference.verdict == verdict]
        if labels:
            found[title] = f"{_several(labels)}."
    if strength:
        found["What this test could show"] = _could_show(strength)
    found["Cost"] = " ".join(_cost(done, results))
    if len(done) > 1:
        found["Worth its price"] = " ".join(_worth(done))
    return found


def tiles(rows: Sequence[Row]) -> tuple[str, list[Tile]]:
    """The figures of the best method beside those of full fine-tuning, with its label; none where either is missing."""
    full = next((row.figures for row in rows if row.method == "full" and row.is_reference and row.figures), None)
    others = [(row, row.figures) for row in rows if row.figures and row.figures.difference]
    if full is None or not others:
        return "", []
    row, best = max(others, key=lambda pair: pair[1].quality.mean)

    def beside(value: Callable[[Figures], float], show: Callable[[float], str], what: str) -> Tile:
        ours, theirs = value(best), value(full)
        return Tile(
            f"{ours / theirs:.0%}" if ours / theirs >= 0.1 else table.small_percent(ours / theirs),
            what,
            f"{show(ours)} of {show(theirs)}",
        )

    metric = named(best.metric)
    return row.label, [
        Tile(table.percent(best.quality.mean), metric.word, f"full fine-tuning {table.percent(full.quality.mean)}"),
        beside(lambda f: f.train_seconds.mean, table.seconds, "of the training time"),
        beside(lambda f: f.peak_bytes.mean, table.size, "of the peak memory"),
        beside(lambda f: f.adapter_bytes.mean, table.size, "of the stored bytes"),
    ]


_Done = Sequence[tuple[Row, Figures]]


def _compared(done: _Done, results: Sequence[CellResult]) -> str:
    methods = "1 method" if len(done) == 1 else f"{len(done)} methods"
    fewest, most = (some(len(row.seeds) for row, _ in done) for some in (min, max))
    seeds = "one seed each" if most == 1 else f"{'' if fewest == most else 'up to '}{most} seeds each"
    steps = {cell.steps for cell in results if cell.steps}
    same = f"{steps.pop():,} optimiser steps each on the same examples, " if len(steps) == 1 else ""
    return f"{methods}, {seeds}, {same}tested on the same {len(results[0].test_values):,} examples."


def matched(experiment: Mapping[str, Any]) -> str:
    """What the methods were made alike in, and how near each came; empty where nothing was matched."""
    found = experiment.get("resolved", {}).get("matched") or []
    if not found:
        return ""
    others = [one for one in found if one["label"] != one["to"]]
    near = ", ".join(
        f"{one['label']} {one['ratio']:.2f}×" + (f" ({one['setting']} {one['value']})" if one["setting"] else "")
        for one in others
    )
    return f"All methods were given sizes near the {found[0]['by']} of {found[0]['to']}: {near}."


def _could_show(strength: Power) -> str:
    seeds = "one seed" if strength.seeds == 1 else f"{strength.seeds} seeds"
    pairs = "" if strength.pairs == 1 else f", with verdicts corrected for {strength.pairs} pairs"
    return (
        f"With {strength.examples:,} test examples and {seeds}{pairs}, a true difference of "
        f"{100 * strength.detectable:.1f} points would be found 4 times out of 5; smaller ones mostly go unseen."
    )


def _cost(done: _Done, results: Sequence[CellResult]) -> Iterator[str]:
    runs = "1 run" if len(results) == 1 else f"{len(results)} runs"
    yield f"{table.seconds(sum(cell.train_seconds for cell in results))} of training in {runs}."
    if len(done) > 1:
        yield _range(done, "Training took", lambda figures: figures.train_seconds.mean, table.seconds)
        yield _range(done, "Peak memory was", lambda figures: figures.peak_bytes.mean, table.size)
        yield _range(done, "On disk a method takes", lambda figures: figures.adapter_bytes.mean, table.size)


def _range(done: _Done, words: str, value: Callable[[Figures], float], show: Callable[[float], str]) -> str:
    (least, low), (most, high) = (find(done, key=lambda pair: value(pair[1])) for find in (min, max))
    return f"{words} from {show(value(low))} ({least.label}) to {show(value(high))} ({most.label})."


def _worth(done: _Done) -> Iterator[str]:
    """Which methods are on the front of each price."""
    prices: dict[str, Callable[[Figures], float]] = {
        "For its training time": lambda figures: figures.train_seconds.mean,
        "For its memory": lambda figures: figures.peak_bytes.mean,
        "For its bytes": lambda figures: figures.adapter_bytes.mean,
    }
    for words, price in prices.items():
        front = on_front([(price(figures), figures.quality.mean) for _, figures in done])
        labels = [row.label for (row, _), best in zip(done, front, strict=True) if best]
        yield f"{words} nothing beats {_several(labels)}."


def _several(labels: Sequence[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}"


def _called(row: Row) -> str:
    return "full fine-tuning" if row.method == "full" else row.label
