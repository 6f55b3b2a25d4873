"""`deltatune merge`: write a base with a saved adapter merged in, a model like any other."""

from json import dumps
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from deltatune.cli import options

EXAMPLES = """
**Examples**

    deltatune merge my-adapter --out my-model

    deltatune merge my-adapter --out my-model --base ./my-bert --json
"""


def command(
    folder: options.AdapterFolder,
    out: Annotated[Path, typer.Option(help="New folder for the model and its tokenizer.")],
    base: Annotated[str, typer.Option(help="Base, where the adapter's own is not found under its name.")] = "",
    tolerance: Annotated[
        float, typer.Option(help="Most that merging may change an output, as a share of the largest.")
    ] = 1e-3,
    json: options.Json = False,
) -> None:
    """Merges a saved adapter into its base for good and writes a model that Transformers loads alone, in fp32.

    The merged model is held against the adapted one on a few texts of random tokens first. Where an output differs by
    more than the tolerance, nothing is written.
    """
    from deltatune.cli.progress import waiting

    with waiting("loading and merging"):
        from deltatune.training.merging import merge_saved

        saved, merged = merge_saved(folder, out, base=base, tolerance=tolerance)
    figures = {
        "method": saved.method.name,
        "layers": merged.layers,
        "largest_difference": merged.difference,
        "largest_output": merged.largest,
        "out": str(out),
    }
    if json:
        print(dumps(figures, ensure_ascii=False))
        return
    table = Table(*figures, box=None)
    table.add_row(*(f"{value:.2g}" if isinstance(value, float) else str(value) for value in figures.values()))
    options.table_console().print(table)
