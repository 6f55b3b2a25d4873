"""`deltatune watch`: a page that follows a run as it goes."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

EXAMPLES = """
**Examples**

    deltatune watch runs/demo

    deltatune watch runs/demo --port 8010 --open
"""


def command(
    run: Annotated[Path, typer.Argument(help="Run folder that `compare` or `tune` writes to.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")] = 0,
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Follows a run in the browser, as it goes: its cells, their loss curves, and the report once it is there.

    The page is for this machine alone. Ctrl-C ends it, and the run goes on.
    """
    from deltatune.comparing.watching import WatchServer

    with WatchServer(run, port) as server:
        console = Console(stderr=True, highlight=False, emoji=False)
        console.print(
            f"following {run} at {server.url}   (Ctrl-C ends this, not the run)", soft_wrap=True, markup=False
        )
        if show:
            typer.launch(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
