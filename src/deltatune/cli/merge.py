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

    deltatune merge my-adapter --out my-model --storage fp32 --base ./my-bert --json

    deltatune merge my-qlora --out my-small-model --storage nf4
"""


def command(
    folder: options.AdapterFolder,
    out: Annotated[Path, typer.Option(help="New folder for the model and its tokenizer.")],
    base: Annotated[str, typer.Option(help="Base, where the adapter's own is not found under its name.")] = "",
    storage: Annotated[
        str,
        typer.Option(
            help="How the merged weights are stored: bf16, fp32, or again in fewer bits: nf4, fp4, nf3, nf2, int8; "
            "by target {mlp: nf4, …}."
        ),
    ] = "bf16",
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Most that merging may change an output, as a share of the largest; left out, 0.03 for bf16, 0.001 "
            "for fp32, and none for fewer bits."
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Merges a saved adapter into its base for good and writes a model that Transformers loads alone, in bf16 or fp32.

    The merged model is held against the adapted one on a few texts of random tokens first. Where an output differs by
    more than the tolerance, nothing is written. Weights stored in fewer bits again lose accuracy: it prints by how
    much outputs change, and where the adapter knows its data what its validation split says before and after. Such a
    model is loaded by deltatune.
    """
    from deltatune.cli.progress import waiting

    with waiting("loading and merging"):
        from deltatune.training.merging import merge_saved

        done = merge_saved(folder, out, base=base, storage=storage, tolerance=tolerance)
    figures: dict[str, object] = {
        "method": done.saved.method.name,
        "layers": done.layers,
        "storage": done.storage,
        "largest_difference": done.difference,
        "mean_difference": done.mean_difference,
        "largest_output": done.largest,
    }
    if done.before and done.after:
        figures |= {
            "loss_before": done.before.loss,
            "loss_after": done.after.loss,
            f"{done.before.metric}_before": done.before.quality,
            f"{done.before.metric}_after": done.after.quality,
        }
    figures["out"] = str(out)
    if json:
        print(dumps(figures, ensure_ascii=False))
        return
    table = Table(box=None, show_header=False)
    for name, value in figures.items():
        table.add_row(name, f"{value:.3g}" if isinstance(value, float) else str(value))
    options.table_console().print(table)
