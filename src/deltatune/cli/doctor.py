"""`deltatune doctor`: measures this machine, so that plans can say how long a run takes on it."""

import json as jsonlib

from rich.table import Table

from deltatune.cli import options

EXAMPLES = """
**Examples**

    deltatune doctor

    deltatune doctor --json > my-machine.json
"""


def command(json: options.Json = False) -> None:
    """Measures products, memory and what a process takes on this machine, and keeps that for `deltatune plan`."""
    from deltatune.cli.progress import waiting

    with waiting("measuring this machine"):
        from deltatune.planning.doctor import checks, this_machine

        machine = this_machine(measure=True)
    if json:
        print(jsonlib.dumps(machine.as_json()))
        return
    table = Table(box=None, show_header=False)
    for name, value in checks(machine):
        table.add_row(name, value)
    options.table_console().print(table)
