"""The `deltatune` command: its subcommands, and what a user sees when something is wrong."""

import logging
import os
import signal
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from typer.exceptions import TyperException

from deltatune.cli import (
    chat,
    compare,
    data,
    doctor,
    evaluate,
    merge,
    merge_runs,
    methods,
    plan,
    predict,
    recommend,
    tune,
    watch,
)
from deltatune.errors import UserError

app = typer.Typer(
    help="Adapt a pretrained model by training a few parameters, and know what each way of doing it costs and brings.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
for module in (compare, watch, merge_runs, tune, evaluate, predict, chat, merge, methods, plan, recommend, doctor):
    app.command(name=module.__name__.rpartition(".")[2].replace("_", "-"), epilog=module.EXAMPLES)(module.command)
app.add_typer(data.app, name="data")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"deltatune {version('deltatune')}")
        raise typer.Exit


@app.callback()
def _settings(
    show: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("deltatune").setLevel(logging.INFO)


def main() -> None:
    """Runs the command line. What a user can mend becomes one message with a hint on stderr, and an exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # asked to end by a system or by Ctrl-C: the same
    try:
        code = _run()
        sys.stdout.flush()
    except UserError as error:
        _tell(error.message, error.hint)
        code = 1
    except TyperException as error:
        code = 2
        if message := error.format_message():  # none where help was shown for want of a command
            path = context.command_path if (context := getattr(error, "ctx", None)) else "deltatune"
            _tell(message[0].lower() + message[1:].rstrip("."), f"see {path} --help")
    except KeyboardInterrupt:
        _console().print("interrupted: finished runs are kept; the same command goes on from there", soft_wrap=True)
        code = 130
    except BrokenPipeError:  # the reader of our output has gone, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except Exception as error:
        if os.environ.get("DELTATUNE_DEBUG"):
            raise
        _tell(
            f"unexpected {type(error).__name__}: {error}",
            "this is a fault of ours; DELTATUNE_DEBUG=1 shows where it happened",
        )
        code = 70
    sys.exit(code)


def _run() -> int:
    # Typer's own `main` would end at Ctrl-C and at a closed pipe without a word; here they arrive as they are.
    command = typer.main.get_command(app)
    try:
        with command.make_context("deltatune", sys.argv[1:]) as context:
            command.invoke(context)
    except typer.Exit as done:  # after --help
        return done.exit_code
    return 0


def _tell(message: str, hint: str) -> None:
    console = _console()
    console.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    if hint:
        console.print(f"[bold]hint:[/] {escape(hint)}", soft_wrap=True)


def _console() -> Console:
    return Console(stderr=True, highlight=False, emoji=False)
