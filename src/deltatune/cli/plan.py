"""`deltatune plan`: what each method will cost on a base, before anything is loaded."""

import json as jsonlib
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from deltatune.cli import options

if TYPE_CHECKING:
    from deltatune.planning.plan import Plan, Refused

EXAMPLES = """
**Examples**

    deltatune plan --base minilm

    deltatune plan --base smollm2 --method lora:rank=16 --storage nf4 --tokens 1024 --length 128 --explain

    deltatune plan --base huggyllama/llama-65b --method lora --storage nf4 --machine a100-40

    deltatune plan --claims
"""


def command(
    base: options.Base = "minilm",
    method: Annotated[
        list[str] | None, typer.Option(help="Method with its options, such as lora:rank=16; several times, or all.")
    ] = None,
    storage: options.Storage = "",
    batch: Annotated[int | None, typer.Option(help="Examples in a batch, in place of --tokens.", min=1)] = None,
    tokens: Annotated[int, typer.Option(help="Tokens in a batch.", min=1)] = 1024,
    length: Annotated[int, typer.Option(help="Tokens of an example.", min=1)] = 128,
    examples: Annotated[int | None, typer.Option(help="Training examples: says how long the run takes.", min=1)] = None,
    labels: Annotated[int | None, typer.Option(help="Labels of a classifier; 0 for a language model.", min=0)] = None,
    machine: options.Machine = "",
    epochs: options.Epochs = None,
    precision: options.Precision = None,
    setting: options.Setting = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print every term, and which modules keep what.")] = False,
    claims: Annotated[bool, typer.Option("--claims", help="Recompute the figures that are taught instead.")] = False,
    json: options.Json = False,
) -> None:
    """Plans parameters, memory and time of methods on a base; only its configuration is read."""
    from deltatune.cli.progress import waiting

    if claims:
        from deltatune.planning.claims import check_claims, page

        found = check_claims()
        print(jsonlib.dumps([vars(one) for one in found], ensure_ascii=False, indent=2) if json else page(found))
        return
    with waiting("planning"):
        from deltatune.planning.plan import plan

        tokens = batch * length if batch else tokens
        training = {"batch_tokens": tokens, "max_length": max(2, length)}
        plans = plan(
            base,
            "all" if method in (None, ["all"]) else method or "all",
            storage=storage,
            tokens=tokens,
            length=length,
            labels=None if labels is None else tuple(map(str, range(labels))),
            examples=examples,
            settings=options.settings("plan", training | options.training(epochs, None, precision, setting)),
            machine=machine,
            explain=explain,
        )
    if json:
        print(jsonlib.dumps([_plain(one) for one in plans], ensure_ascii=False, indent=2))
        return
    console = options.table_console()
    console.print(_table(plans))
    for one in plans if explain else ():
        if not hasattr(one, "reason"):
            console.print(_terms(one))


def _plain(one: "Plan | Refused") -> dict[str, object]:
    return {"method": one.method, "does_not_fit": one.reason} if hasattr(one, "reason") else one.as_json()


def _table(plans: "list[Plan | Refused]") -> Table:
    table = Table("method", box=None, caption_justify="left")
    for heading in ("trained", "adapter", "weights", "gradients", "states", "activations", "temporaries", "peak"):
        table.add_column(heading, justify="right")
    for heading in ("step", "run", "fits"):
        table.add_column(heading, justify="right")
    for one in plans:
        if hasattr(one, "reason"):
            table.add_row(one.method, f"[dim]{one.reason}[/]")
            continue
        memory = one.memory
        sizes = (
            *(one.adapter_bytes, memory.weights + memory.trained, memory.gradients, memory.states),
            *(memory.activations, memory.temporaries, memory.peak),
        )
        table.add_row(
            one.method,
            f"{one.counted.trainable:,}",
            *map(size, sizes),
            seconds(one.step_seconds),
            "" if one.seconds is None else seconds(one.seconds),
            "yes" if one.fits else "[red]no[/]",
        )
        table.caption = f"{one.base}, {one.tokens:,} tokens a step, on {one.machine}"
    return table


def _terms(one: "Plan") -> Table:
    table = Table(title=one.method, box=None, title_justify="left", show_header=False)
    for name, value in one.memory.terms().items():
        table.add_row(name, value if isinstance(value, str) else size(value))
    for name, value in list(one.kept.items())[:20]:
        table.add_row(f"  kept by {name or 'the model'}", size(value))
    table.add_row("operations of a step", f"{one.flops:.3g}")
    return table


def size(count: float) -> str:
    """Bytes as people read them, in powers of ten."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 999.5 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count:.0f} B"


def seconds(count: float) -> str:
    """A time as people read it."""
    for unit, scale in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if count >= 1.5 * scale or (unit == "s" and count >= 1):
            return f"{count / scale:.3g} {unit}"
    return f"{1000 * count:.3g} ms"
