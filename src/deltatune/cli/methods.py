"""`deltatune methods`: what there is to choose from, and how many parameters it trains on a base."""

import json as jsonlib
from typing import Annotated, Any

import typer
from rich.table import Table

from deltatune.cli import options

EXAMPLES = """
**Examples**

    deltatune methods

    deltatune methods lora

    deltatune methods --base minilm

    deltatune methods lora:rank=16,targets=attention --base ./my-bert
"""


def command(
    name: Annotated[
        str, typer.Argument(help="Show one method with all its options; with --base, as lora:rank=16 sets them.")
    ] = "",
    base: Annotated[str, typer.Option(help="Count parameters on this base; no weights are read.")] = "",
    json: options.Json = False,
) -> None:
    """Lists the methods, or the options of one; counts their parameters on a base."""
    from deltatune.cli.progress import waiting
    from deltatune.methods import parse
    from deltatune.methods.describe import describe, describe_all

    chosen, given = parse(name) if name else ("", {})
    methods: list[dict[str, Any]] = [describe(chosen)] if chosen else describe_all()
    if base or given:
        with waiting("counting"):
            from deltatune.models.count import count_all

            methods = count_all(methods, base or "minilm", given)
    if json:
        print(jsonlib.dumps(methods[0] if chosen else methods, ensure_ascii=False, indent=2))
    elif base or given:
        options.table_console().print(_counts(methods))
    elif chosen:
        options.table_console().print(_options(methods[0]))
    else:
        options.table_console().print(_list(methods))


def _list(methods: list[dict[str, Any]]) -> Table:
    table = Table(box=None)
    for heading in ("method", "family", "what it does", "merges", "paper", "file"):
        table.add_column(heading, no_wrap=heading in ("method", "family", "file"))
    for method in methods:
        shown = {**method, "merges": method["merges"].partition(":")[0]}  # why not: `deltatune methods NAME`
        table.add_row(*(shown[key] for key in ("name", "family", "summary", "merges", "paper", "file")))
    return table


def _options(method: dict[str, Any]) -> Table:
    table = Table("option", "default", "what it does", box=None, title_justify="left")
    table.title = f"{method['title']}: {method['summary']}"
    table.caption, table.caption_justify = f"merges into the base: {method['merges']}", "left"
    for option in method["options"]:
        table.add_row(option["name"], jsonlib.dumps(option["default"]), option["help"])
    return table


def _counts(methods: list[dict[str, Any]]) -> Table:
    table = Table("method", "family", "merges", "file", box=None)
    for heading in ("layers", "trained", "of all", "stored"):
        table.add_column(heading, justify="right")
    for method in methods:
        row = [method["name"], method["family"], method["merges"], method["file"]]
        if "does_not_fit" in method:
            table.add_row(*row[:3], f"[dim]{method['does_not_fit']}[/]")
            continue
        share = f"{100 * method['trainable'] / method['total']:.3g}%"
        table.add_row(*row, f"{method['layers']:,}", f"{method['trainable']:,}", share, f"{method['stored']:,}")
    return table
