"""`deltatune merge-runs`: join runs of one experiment that were made on several machines."""

from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from deltatune.cli import options

EXAMPLES = """
**Examples**

    deltatune compare experiments/demo.yaml --seed 0 --out runs/a

    deltatune compare experiments/demo.yaml --seed 1 --out runs/b

    deltatune merge-runs runs/a runs/b --out runs/both
"""


def command(
    folders: Annotated[list[Path], typer.Argument(help="Run folders that `compare` wrote.")],
    out: Annotated[Path, typer.Option(help="New folder for the whole.")],
    json: options.Json = False,
) -> None:
    """Joins runs of the same experiment, with other seeds or methods, into one folder with one report.

    Runs of other data, settings, code or library versions are refused. What a cell took of time and memory is its
    machine's: compare costs only where the machines are alike.
    """
    from deltatune.cli.progress import waiting

    with waiting("reading the runs"):
        from deltatune.comparing.joining import join
        from deltatune.comparing.records import records
        from deltatune.comparing.table import rows, terminal_table

        done = join(folders, out)
    if json:
        print(dumps(records(done.results, done.failed), ensure_ascii=False, indent=2))
    else:
        console = options.table_console()
        console.print(terminal_table(rows(done.results, done.failed), console.width))
    typer.echo(f"report: {done.report}", err=True)
