"""`deltatune data`: look at data as training would see it."""

import json as jsonlib
from typing import Annotated, Any
from unicodedata import category

import typer
from rich.console import Console
from rich.text import Text

from deltatune.cli import options

EXAMPLES = """
**Examples**

    deltatune data show rotten-tomatoes

    deltatune data show docstrings --base smollm2 --count 1

    deltatune data show articles.csv --template "Summarise: {article}" --label summary --base ./my-t5

    deltatune data show chats.jsonl --base smollm2 --split test --json
"""

app = typer.Typer(help="Look at data as training would see it.", no_args_is_help=True, rich_markup_mode="markdown")


@app.callback()
def _group() -> None:
    """Look at data as training would see it."""


@app.command(epilog=EXAMPLES)
def show(
    name: Annotated[str, typer.Argument(help="Embedded name, file, folder, or hub id.")],
    base: Annotated[
        str, typer.Option(help="Show the tokens that this base reads and learns; no weights are read.")
    ] = "",
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    count: Annotated[int, typer.Option(min=0, help="Examples to show.")] = 3,
    max_length: Annotated[int, typer.Option(min=2, help="Most tokens of an example.")] = 256,
    text: options.Text = None,
    label: options.Label = "",
    task: options.Task = "",
    system: options.System = "",
    template: options.Template = "",
    json: options.Json = False,
) -> None:
    """Shows where data is from, how it is split, and some examples with what of them is learnt.

    What is scored is green and what is only read is dim; where there are no colours, ⟦ and ⟧ enclose what is scored.
    """
    from deltatune.cli.progress import waiting

    with waiting("reading"):
        from deltatune.data import load_data
        from deltatune.data.show import show as describe

        data = load_data(name, task=task, text=tuple(text or ()), label=label, system=system, template=template)
        about = describe(data, split=split, count=count, base=base, max_length=max_length)
    if json:
        print(jsonlib.dumps(about, ensure_ascii=False, indent=2))
        return
    console = options.table_console()
    _print_head(console, about)
    for place, example in enumerate(about["shown"], 1):
        _print_example(console, about, place, example)
    if "tokens" in about:
        _print_tokens(console, about)


def _print_head(console: Console, about: dict[str, Any]) -> None:
    sizes = ", ".join(f"{count:,} {name}" for name, count in about["examples"].items())
    columns = " and ".join(filter(None, (", ".join(about["text"]), about["label"])))
    console.print(Text(f"{about['name']}: {about['task']}, from {columns} ({about['revision']})"), soft_wrap=True)
    console.print(Text(f"{sizes}; {about['splitting']}"), soft_wrap=True)
    if about["duplicates"] or about["incomplete"]:
        dropped = f"left out: {about['duplicates']:,} duplicates, {about['incomplete']:,} incomplete rows"
        console.print(Text(dropped), soft_wrap=True)


def _print_example(console: Console, about: dict[str, Any], place: int, example: dict[str, Any]) -> None:
    words = [f"{about['split']} {place}"]
    words += [f"row {example['row']}"] if example.get("row") else []
    words += [f"{example['scored']:,} of {example['tokens']:,} tokens scored"] if "tokens" in example else []
    words += [f"label {example['label']}"] if "label" in example else []
    console.print()
    console.print(Text(", ".join(words), style="bold"))
    colours = console.is_terminal and not console.no_color
    shown = Text()
    if "parts" not in example:
        shown.append(_visible("\n".join(filter(None, (example["text"], example.get("pair"))))))
    for part in example.get("parts", ()):
        if part.get("role", "text") != "text":
            shown.append(f"{chr(10) if shown else ''}{part['role']}: ", style="bold" if colours else "")
        marked = part["scored"] and not colours
        said = _visible(part["text"])
        shown.append(f"⟦{said}⟧" if marked else said, style=("green" if part["scored"] else "dim") if colours else "")
    console.print(shown, soft_wrap=True)


def _print_tokens(console: Console, about: dict[str, Any]) -> None:
    figures = about["tokens"]
    all_of_them = figures["counted"] == about["examples"][about["split"]]
    which = f"all {figures['counted']:,}" if all_of_them else f"the first {figures['counted']:,}"
    lengths = f"{figures['mean']:.1f} tokens on average, {figures['scored']:.1f} of them scored"
    longest = f"{figures['longest']:,} at most"
    lost = f"{figures['truncated']:,} were longer than {figures['limit']:,} and lost a part"
    words = f"{which} {about['split']} examples have {lengths}, and {longest}; {lost}"
    console.print()
    console.print(Text(words), soft_wrap=True)


def _visible(text: str) -> str:
    """Shows control characters as pictures, so that what stands in data does not steer the terminal."""
    return "".join(letter if category(letter) != "Cc" or letter in "\n\t" else _picture(letter) for letter in text)


def _picture(control: str) -> str:
    return chr(0x2400 + ord(control)) if control < " " else "�"
