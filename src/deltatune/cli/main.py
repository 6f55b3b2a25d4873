"""The `deltatune` command: its subcommands, and what a user sees when something is wrong."""

import logging
import os
import sys

import typer
from click.exceptions import ClickException
from rich.console import Console
from rich.markup import escape

from deltatune.cli import compare, evaluate, methods, predict, tune
from deltatune.errors import UserError

app = typer.Typer(
    help="Adapt a pretrained model by training a few parameters, and know what each way of doing it costs and brings.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
for module in (compare, tune, evaluate, predict, methods):
    app.command(name=module.__name__.rpartition(".")[2], epilog=module.EXAMPLES)(module.command)


@app.callback()
def _settings() -> None:
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("deltatune").setLevel(logging.INFO)


def main() -> None:
    """Runs the command line. What a user can mend becomes one message with a hint on stderr, and an exit code."""
    console = Console(stderr=True, highlight=False)
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        console.print(f"[bold red]error:[/] {escape(error.message)}", soft_wrap=True)
        if error.hint:
            console.print(f"[bold]hint:[/] {escape(error.hint)}", soft_wrap=True)
        code = 1
    except ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        console.print("interrupted: what was finished is kept; the same command goes on from there")
        code = 130
    except BrokenPipeError:  # the reader of our output has gone, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except Exception as error:
        if os.environ.get("DELTATUNE_DEBUG"):
            raise
        console.print(f"[bold red]error:[/] unexpected {type(error).__name__}: {escape(str(error))}", soft_wrap=True)
        console.print("[bold]hint:[/] this is a fault of ours; DELTATUNE_DEBUG=1 shows where it happened")
        code = 70
    sys.exit(code)
