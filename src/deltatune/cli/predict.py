"""`deltatune predict`: label texts with a saved adapter."""

import json
from typing import Annotated

import typer

from deltatune.cli import options

EXAMPLES = """
**Examples**

    echo "a quiet, moving film" | deltatune predict my-adapter

    deltatune predict my-adapter --input texts.jsonl > labels.jsonl
"""


def command(
    folder: options.AdapterFolder,
    input: Annotated[str, typer.Option(help="File with one text a line, plain or as JSON; - is stdin.")] = "-",
    base: Annotated[str, typer.Option(help="Base, where the adapter's own is not found under its name.")] = "",
    precision: options.Precision = None,
) -> None:
    """Labels each line of a file, or of stdin; prints one JSON object for each, in the same order.

    A line that starts with { is read as JSON with the keys "text" and, for sentence pairs, "pair". Empty lines are
    left out.
    """
    from deltatune.cli.progress import waiting

    with waiting("loading and labelling"):
        from deltatune.training.saved import open_adapter, predict, read_texts

        texts = read_texts(input)
        lines = list(predict(open_adapter(folder, base=base, precision=precision or ""), texts))
    for line in lines:
        print(json.dumps(line, ensure_ascii=False))
