"""`deltatune recommend`: which method to take within a budget, and why."""

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from deltatune.cli import options

EXAMPLES = """
**Examples**

    deltatune recommend --memory 2GB --time 10m --adapter-size 1MB

    deltatune recommend --base smollm2 --data docstrings --goal speed --from runs/summarise --trial 3m
"""


def command(
    base: options.Base = "minilm",
    data: options.Data = "rotten-tomatoes",
    memory: Annotated[str, typer.Option(help="Most memory, such as 4GB.")] = "",
    time: Annotated[str, typer.Option(help="Most time for the training steps, such as 10m.")] = "",
    adapter_size: Annotated[str, typer.Option(help="Most bytes of the adapter's file, such as 1MB.")] = "",
    goal: Annotated[
        str, typer.Option(help="What counts among those that fit: quality, speed, size or serving.")
    ] = "quality",
    runs: Annotated[
        list[Path] | None, typer.Option("--from", help="Folder of a comparison: evidence. Several times.")
    ] = None,
    trial: Annotated[str, typer.Option(help="Time to spend on short runs of the best three, such as 3m.")] = "",
    machine: options.Machine = "",
    text: options.Text = None,
    label: options.Label = "",
    task: options.Task = "",
    train: options.TrainLimit = None,
    epochs: options.Epochs = None,
    precision: options.Precision = None,
    setting: options.Setting = None,
    json: options.Json = False,
) -> None:
    """Filters methods by their plan, ranks them by evidence, says why each is in or out, and prints the command."""
    from deltatune.cli.progress import waiting

    with waiting("planning"):
        from deltatune.data import load_data
        from deltatune.planning.budget import read_bytes, read_seconds
        from deltatune.planning.recommend import Limits, recommend

        found = recommend(
            base,
            load_data(data, task=task, text=tuple(text or ()), label=label).limited(train, None, None, seed=0),
            Limits(
                read_bytes(memory) if memory else None,
                read_seconds(time) if time else None,
                read_bytes(adapter_size) if adapter_size else None,
            ),
            goal,  # type: ignore[arg-type]
            settings=options.settings("recommend", options.training(epochs, None, precision, setting)),
            machine=machine,
            runs=runs or (),
            trial=read_seconds(trial) if trial else 0.0,
        )
    best = found[0] if not found[0].out else None
    chosen = f"deltatune tune --base {base} --data {data} {best.words} --out my-adapter" if best else ""
    if json:
        print(
            jsonlib.dumps(
                {"command": chosen, "candidates": [_plain(one) for one in found]}, ensure_ascii=False, indent=2
            )
        )
        return
    console = options.table_console()
    console.print(_table(found))
    console.print(chosen or "nothing fits: allow more memory, time or bytes", soft_wrap=True)


def _plain(one: Any) -> dict[str, Any]:
    return {**vars(one), "plan": None if one.plan is None else one.plan.as_json()}


def _table(found: Any) -> Table:
    from deltatune.cli.plan import seconds, size

    table = Table("", "method", "storage", box=None)
    for heading in ("memory", "time", "file", "measured"):
        table.add_column(heading, justify="right")
    table.add_column("why")
    for one in found:
        plan = one.plan
        costs = ("", "", "")
        if plan is not None:
            costs = (size(plan.memory.peak), seconds(plan.seconds or 0.0), size(plan.adapter_bytes))
        table.add_row(
            "✗" if one.out else "●" if one.pareto else "○",
            one.method,
            one.storage,
            *costs,
            "" if one.quality is None else f"{one.quality:.3f}",
            f"out: {one.out}" if one.out else one.evidence,
        )
    table.caption, table.caption_justify = (
        "● on the Pareto front of memory, time, file and rank  ○ beaten  ✗ out",
        "left",
    )
    return table
