"""What several commands share: their options, and the console that their tables go to."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from deltatune.training.settings import Training

Base = Annotated[
    str, typer.Option(help="Base model: minilm, smollm2, a local folder, or a hub id with an optional @revision.")
]
Data = Annotated[
    str, typer.Option(help="Data: rotten-tomatoes, docstrings, a CSV, TSV, JSONL, JSON or Parquet file, or a hub id.")
]
Text = Annotated[
    list[str] | None, typer.Option(help="Text column, twice for sentence pairs; or that of the prompts or chats.")
]
Label = Annotated[str, typer.Option(help="Label column, or that of the completions.")]
Task = Annotated[str, typer.Option(help="classification or generation, where the columns would say otherwise.")]
System = Annotated[str, typer.Option(help="What the system says before every example; makes a chat of prompts.")]
Template = Annotated[str, typer.Option(help='Words around columns to make the prompt of: "Summarise: {document}".')]
TrainLimit = Annotated[int | None, typer.Option(help="Most training examples to use.")]
ValidationLimit = Annotated[int | None, typer.Option(help="Most validation examples to use.")]
TestLimit = Annotated[int | None, typer.Option(help="Most test examples to use.")]
Epochs = Annotated[float | None, typer.Option(help="Passes over the training split.")]
LearningRate = Annotated[float | None, typer.Option(help="Peak learning rate; left out, the method's own.")]
Precision = Annotated[str | None, typer.Option(help="auto, fp32 or bf16; auto is bf16 where the machine has it.")]
Setting = Annotated[
    list[str] | None,
    typer.Option("--training", help="Any other training setting, such as warmup=0.1 or gradient_checkpointing=true."),
]
Decoding = Annotated[
    list[str] | None,
    typer.Option(help="How it writes, such as temperature=0.7, beams=4 or max_new_tokens=200; several times."),
]
Storage = Annotated[
    str, typer.Option(help="Storage of the base: nf4, fp4, nf3, nf2, int8, bf16, fp32; by target {mlp: nf4, …}.")
]
Machine = Annotated[
    str,
    typer.Option(
        help="Plan for another machine: a100, h100, l4, t4, rtx4090 …, or a file `doctor --measure --json` wrote."
    ),
]
Track = Annotated[
    list[str] | None, typer.Option(help="Also write to a tracker: tensorboard, mlflow, trackio or wandb (offline).")
]
Force = Annotated[bool, typer.Option("--force", help="Run even if the plan exceeds this machine's memory.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
AdapterFolder = Annotated[Path, typer.Argument(help="Folder that `tune` or `compare` wrote, or that PEFT wrote.")]


def data_choice(**given: Any) -> dict[str, Any]:
    """The `data` part of an experiment as flags give it; what was not given is left out."""
    return {key: value for key, value in given.items() if value not in (None, "", [])}


def training(
    epochs: float | None, learning_rate: float | None, precision: str | None, settings: list[str] | None
) -> dict[str, Any]:
    """The `training` part of an experiment as flags give it; what was not given is left out."""
    from deltatune.methods import parse_option

    named = {"epochs": epochs, "learning_rate": learning_rate, "precision": precision}
    return {key: value for key, value in named.items() if value is not None} | dict(map(parse_option, settings or []))


def decoding(settings: list[str] | None) -> dict[str, Any]:
    """The `decoding` part of an experiment as flags give it."""
    from deltatune.methods import parse_option

    return dict(map(parse_option, settings or []))


def table_console() -> Console:
    """Stdout for tables: as wide as the terminal; in a pipe or file wide enough for whole lines."""
    console = Console(highlight=False, emoji=False)
    return console if console.is_terminal else Console(highlight=False, emoji=False, width=max(120, console.width))


def settings(command: str, given: dict[str, Any]) -> "Training":
    """The settings of a run from those `given`. Raises `UserError` that names a wrong one."""
    from deltatune.comparing.experiment import make_experiment

    return make_experiment({"methods": ["lora"], "training": given}, command).training
