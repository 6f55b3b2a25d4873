"""`deltatune predict`: what a saved adapter says of texts: their labels, or what it writes."""

import json
from typing import Annotated

import typer

from deltatune.cli import options

EXAMPLES = """
**Examples**

    echo "a quiet, moving film" | deltatune predict my-adapter

    deltatune predict my-adapter --input texts.jsonl > labels.jsonl

    deltatune predict my-writer --input prompts.txt --decoding beams=4 --decoding max_new_tokens=100
"""


def command(
    folder: options.AdapterFolder,
    input: Annotated[str, typer.Option(help="File with one text a line, plain or as JSON; - is stdin.")] = "-",
    base: Annotated[str, typer.Option(help="Base, where the adapter's own is not found under its name.")] = "",
    precision: options.Precision = None,
    decoding: options.Decoding = None,
) -> None:
    """Labels each line of a file, or of stdin, or answers it; prints one JSON object for each, in the same order.

    A line that starts with { is read as JSON with the keys "text" and, for sentence pairs, "pair"; for an adapter that
    writes with "text", "messages", or the columns of the template that it was trained with. Empty lines are left out.
    """
    from deltatune.cli.progress import waiting

    with waiting("loading and predicting"):
        from deltatune.methods import parse_option
        from deltatune.training.asking import predictions
        from deltatune.training.saved import open_adapter, read_lines

        given = read_lines(input)
        ready = open_adapter(folder, base=base, precision=precision or "")
        lines = list(predictions(ready, given, dict(map(parse_option, decoding or []))))
    for line in lines:
        print(json.dumps(line, ensure_ascii=False))
