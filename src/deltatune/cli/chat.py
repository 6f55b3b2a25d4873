"""`deltatune chat`: talk with a saved adapter or a bare base."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from deltatune.cli import options
from deltatune.errors import UserError

EXAMPLES = """
**Examples**

    deltatune chat my-adapter

    deltatune chat --base smollm2 --decoding temperature=0.7 --decoding top_p=0.9

    echo "What is an adapter?" | deltatune chat my-adapter
"""


def command(
    folder: Annotated[Path | None, typer.Argument(help="Folder of a saved adapter; left out, a bare base.")] = None,
    base: Annotated[str, typer.Option(help="The bare base, or where the adapter's own is now.")] = "",
    storage: Annotated[str, typer.Option(help="Storage of a bare base, such as nf4.")] = "",
    system: Annotated[str, typer.Option(help="What the system says before everything.")] = "",
    precision: options.Precision = None,
    decoding: options.Decoding = None,
) -> None:
    """Talks with a language model: each line that is typed or piped in is a turn, and the answer goes to stdout.

    A line /reset begins anew; Ctrl-D or Ctrl-C ends.
    """
    from deltatune.cli.progress import waiting

    with waiting("loading"):
        from deltatune.methods import parse_option
        from deltatune.training.chat import open_chat
        from deltatune.training.generation import read_decoding

        settings = read_decoding({"max_new_tokens": 256} | dict(map(parse_option, decoding or [])))
        talk = open_chat(folder, settings, base=base, storage=storage, precision=precision or "", system=system)
    try:
        for line in _typed() if sys.stdin.isatty() else _piped():
            if line.strip() == "/reset":
                talk.reset()
            elif line.strip():
                talk.reply(line.strip(), lambda piece: print(piece, end="", flush=True))
                print(flush=True)
    except KeyboardInterrupt:
        print()


def _typed() -> Iterator[str]:
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  # `input` then edits lines and remembers them
    print("/reset begins anew, Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _piped() -> Iterator[str]:
    for line in sys.stdin.buffer:
        try:
            yield line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"stdin is not in UTF-8: {error.reason}", "save it as UTF-8") from error
