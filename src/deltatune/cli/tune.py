"""`deltatune tune`: train one method and save what was trained."""

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltatune.cli import options

if TYPE_CHECKING:
    from deltatune.training.events import Event

EXAMPLES = """
**Examples**

    deltatune tune --method lora --out my-adapter

    deltatune tune --base ./my-bert --data reviews.csv --method lora --set rank=16 --epochs 3 --out my-adapter

    deltatune tune --method dora --storage nf4 --out my-qdora
"""


def command(
    out: Annotated[Path, typer.Option(help="Folder for the adapter and the record of the run.")],
    base: options.Base = "minilm",
    data: options.Data = "rotten-tomatoes",
    method: Annotated[str, typer.Option(help="Method; `deltatune methods` lists them.")] = "lora",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Option of the method, such as rank=8; several times.")
    ] = None,
    storage: Annotated[
        str,
        typer.Option(help="Storage of the base: nf4, fp4, nf3, nf2, int8, bf16, fp32; by target {mlp: nf4, …}."),
    ] = "",
    seed: Annotated[int, typer.Option(help="Decides the head, the order of examples and the dropout.")] = 0,
    text: options.Text = None,
    label: options.Label = "",
    task: options.Task = "",
    system: options.System = "",
    template: options.Template = "",
    train: options.TrainLimit = None,
    validation: options.ValidationLimit = None,
    test: options.TestLimit = None,
    epochs: options.Epochs = None,
    learning_rate: options.LearningRate = None,
    precision: options.Precision = None,
    setting: options.Setting = None,
    decoding: options.Decoding = None,
    force: options.Force = False,
    track: options.Track = None,
    json: options.Json = False,
) -> None:
    """Trains one method on a base and saves the adapter, its settings, its events and its test scores in a folder."""
    from deltatune.cli.progress import RunProgress

    with RunProgress() as progress:
        from deltatune.comparing.cell import ADAPTER, run_cell
        from deltatune.comparing.experiment import make_experiment
        from deltatune.comparing.records import records
        from deltatune.comparing.trackers import Trackers
        from deltatune.methods import parse, parse_option

        name, given = parse(method)
        content = {
            "base": base,
            "data": options.data_choice(
                name=data,
                text=text,
                label=label,
                task=task,
                system=system,
                template=template,
                train=train,
                validation=validation,
                test=test,
            ),
            "methods": [{"method": name, "options": given | dict(map(parse_option, set_ or [])), "storage": storage}],
            "seeds": [seed],
            "training": options.training(epochs, learning_rate, precision, setting),
            "decoding": options.decoding(decoding),
        }
        [cell] = make_experiment(content, "tune").cells()
        with Trackers(track or (), out) as trackers:

            def listen(event: "Event") -> None:
                progress.show(cell.method.label, event)
                trackers.watch(cell, event)

            result = run_cell(cell, out, listen, force=force)
            trackers.watch(cell, result)
        progress.watch(cell, result)
    if json:
        print(dumps(records([result])[0], ensure_ascii=False, indent=2))
    progress.say(f"adapter: {out / ADAPTER}  ({result.adapter_bytes:,} bytes, {result.trainable:,} parameters)")
