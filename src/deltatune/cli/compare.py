"""`deltatune compare`: train several methods under the same conditions and report what each costs and brings."""

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from deltatune.cli import options
from deltatune.errors import UserError

if TYPE_CHECKING:
    from deltatune.comparing.experiment import Cell
    from deltatune.comparing.sharing import News

EXAMPLES = """
**Examples**

    deltatune compare experiments/demo.yaml

    deltatune compare --method full --method lora:rank=8 --method lora:targets=attention --train 2000

    deltatune compare --base ./my-bert --data reviews.csv --text body --label stars --method lora --seed 0 --seed 1
"""


def command(
    experiment: Annotated[
        Path | None, typer.Argument(help="Experiment file (YAML); flags take the place of what it says.")
    ] = None,
    base: options.Base = "",
    data: options.Data = "",
    method: Annotated[
        list[str] | None, typer.Option(help="Method with its options, such as lora:rank=8; several times.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed; several times for several runs of each method.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; left out, runs/ and the experiment's name.")] = None,
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
    """Compares methods on the same base, data, steps and seeds: accuracy, time, memory, size, in one report.

    Run it again to go on: finished runs are kept, failed ones are tried again.
    """
    from deltatune.cli.live import LiveTable
    from deltatune.cli.progress import RunProgress

    changes = {
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
        "methods": method,
        "seeds": seed,
        "training": options.training(epochs, learning_rate, precision, setting),
        "decoding": options.decoding(decoding),
    }
    folder = out or Path("runs") / (experiment.stem if experiment else "compare")
    with LiveTable() if Console(stderr=True).is_terminal else RunProgress() as progress:
        from deltatune.comparing.compare import compare
        from deltatune.comparing.experiment import read_experiment
        from deltatune.comparing.records import records
        from deltatune.comparing.table import rows, terminal_table
        from deltatune.comparing.trackers import Trackers

        def watch(cell: "Cell", news: "News") -> None:
            progress.watch(cell, news)
            trackers.watch(cell, news)

        chosen = read_experiment(experiment, {key: value for key, value in changes.items() if value})
        if isinstance(progress, LiveTable):
            progress.expect(chosen.cells())
        with Trackers(track or (), folder) as trackers:
            done = compare(chosen, folder, watch, force=force)
    if json:
        print(dumps(records(done.results, done.failed), ensure_ascii=False, indent=2))
    else:
        console = options.table_console()
        console.print(terminal_table(rows(done.results, done.failed), console.width))
    progress.say(f"report: {done.report}")
    if done.failed:
        raise UserError(
            f"{len(done.failed)} of {len(done.failed) + len(done.results)} runs failed; the others are in the report",
            "run the same command again to try these once more",
        )
