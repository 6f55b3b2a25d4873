"""`deltatune doctor`: what runs use on this machine and why, how fast it is, and where a training step goes."""

import json as jsonlib
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from deltatune.cli import options

if TYPE_CHECKING:
    from deltatune.training.profile import Profile

EXAMPLES = """
**Examples**

    deltatune doctor

    deltatune doctor --base ./my-bert

    deltatune doctor --measure

    deltatune doctor --measure --json > my-machine.json

    deltatune doctor --profile --base smollm2 --method lora:rank=16 --tokens 1024 --length 128
"""


def command(
    base: Annotated[str, typer.Option(help="Look at this base, too.")] = "",
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine, and keep that for plans and their --machine.")
    ] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Run training steps and show where they go.")] = False,
    method: Annotated[str, typer.Option(help="Method of these steps, such as lora:rank=16.")] = "lora",
    storage: Annotated[str, typer.Option(help="Storage of the base in these steps.")] = "",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a step.")] = 1024,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each of its texts.")] = 128,
    json: options.Json = False,
) -> None:
    """Says what runs use on this machine and why, measures it for plans, or shows where a training step goes."""
    if measure:
        _measure(json)
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler writes to stderr otherwise
    from deltatune.cli.progress import waiting

    with waiting("looking"):
        from deltatune.methods import make, parse
        from deltatune.models.base import load
        from deltatune.training.doctor import examine_base, examine_machine

        findings, found = examine_machine(), None
        name = base or "minilm"
        if base or profile:
            findings += examine_base(load(name, labels=_labels(name), storage=storage), length)
        if profile:
            from deltatune.training.profile import profile_step

            loaded = load(name, labels=_labels(name), storage=storage)
            found = profile_step(loaded, make(*parse(method)), tokens=tokens, length=length)
    if json:
        said: dict[str, Any] = {"findings": [asdict(finding) for finding in findings]}
        print(
            jsonlib.dumps(said | ({"profile": asdict(found) | {"reached": found.reached}} if found else {}), indent=2)
        )
        return
    console = options.table_console()
    table = Table("what", "chosen", "why", box=None)
    for finding in findings:
        table.add_row(finding.what, finding.chosen, finding.why)
    console.print(table)
    if found:
        console.print(_step(found))


def _measure(json: bool) -> None:
    from deltatune.cli.progress import waiting

    with waiting("measuring this machine"):
        from deltatune.planning.calibration import checks, this_machine

        machine = this_machine(measure=True)
    if json:
        print(jsonlib.dumps(machine.as_json()))
        return
    table = Table(box=None, show_header=False)
    for name, value in checks(machine):
        table.add_row(name, value)
    options.table_console().print(table)


def _labels(base: str) -> tuple[str, ...]:
    """Two labels for a base that cannot write."""
    from deltatune.models.base import tasks
    from deltatune.models.places import find_base

    return () if "generation" in tasks(find_base(base)) else ("no", "yes")


def _step(profile: "Profile") -> Table:
    from deltatune.training.profile import PARTS

    table = Table("part", "what", box=None, title_justify="left")
    table.title = (
        f"a step of {profile.tokens:,} tokens in {profile.precision}: {1000 * profile.seconds:,.0f} ms; its products "
        f"with frozen weights alone take {1000 * profile.limit:,.0f} ms, {profile.reached:.0%} of it"
    )
    table.caption, table.caption_justify = f"fast pieces: {', '.join(profile.pieces) or 'none'}", "left"
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    for part, seconds in sorted(profile.parts.items(), key=lambda item: -item[1]):
        table.add_row(part, PARTS[part], f"{1000 * seconds:,.1f}", f"{seconds / profile.seconds:.0%}")
    return table
