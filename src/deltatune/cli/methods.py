"""`deltatune methods`: what there is to choose from."""

import json as jsonlib
from typing import Annotated

import typer
from rich.table import Table

from deltatune.cli import options

EXAMPLES = """
**Examples**

    deltatune methods

    deltatune methods lora
"""


def command(
    name: Annotated[str, typer.Argument(help="Show one method with all its options.")] = "",
    json: options.Json = False,
) -> None:
    """Lists the methods, or the options of one."""
    from deltatune.methods.describe import describe, describe_all

    if name:
        method = describe(name)
        if json:
            print(jsonlib.dumps(method, ensure_ascii=False, indent=2))
            return
        table = Table(
            "option",
            "default",
            "what it does",
            box=None,
            title=f"{method['title']}: {method['summary']}",
            title_justify="left",
        )
        for option in method["options"]:
            table.add_row(option["name"], jsonlib.dumps(option["default"]), option["help"])
        options.table_console().print(table)
        return
    methods = describe_all()
    if json:
        print(jsonlib.dumps(methods, ensure_ascii=False, indent=2))
        return
    table = Table("method", "family", "what it does", "merges", "paper", box=None)
    for method in methods:
        table.add_row(method["name"], method["family"], method["summary"], method["merges"], method["paper"])
    options.table_console().print(table)
