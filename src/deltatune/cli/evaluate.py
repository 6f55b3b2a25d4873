"""`deltatune evaluate`: score a saved adapter on data."""

from json import dumps
from typing import Annotated

import typer
from rich.table import Table

from deltatune.cli import options

EXAMPLES = """
**Examples**

    deltatune evaluate my-adapter

    deltatune evaluate my-adapter --data reviews.csv --split all --json
"""


def command(
    folder: options.AdapterFolder,
    data: Annotated[str, typer.Option(help="Data; left out, what it was trained on.")] = "",
    split: Annotated[str, typer.Option(help="train, validation, test, or all rows together.")] = "test",
    base: Annotated[str, typer.Option(help="Base, where the adapter's own is not found under its name.")] = "",
    text: options.Text = None,
    label: options.Label = "",
    precision: options.Precision = None,
    json: options.Json = False,
) -> None:
    """Scores a saved adapter: accuracy, macro-F1 and loss of a classifier, loss and perplexity of a language model."""
    from deltatune.cli.progress import waiting

    with waiting("loading and scoring"):
        from deltatune.training.saved import open_adapter, score

        scores = score(
            open_adapter(folder, base=base, precision=precision or ""), data, split, tuple(text or ()), label
        )
    figures = {"examples": len(scores.values), **scores.figures}
    if json:
        print(dumps({"split": split, **figures}))
        return
    table = Table("split", *figures, box=None)
    table.add_row(split, *(f"{value:,}" if isinstance(value, int) else f"{value:.4f}" for value in figures.values()))
    options.table_console().print(table)
