"""The model card of a saved adapter: README.md, with the front matter that the Hugging Face hub reads."""

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from deltatune.comparing import table
from deltatune.comparing.experiment import Cell, Experiment
from deltatune.comparing.quality import named
from deltatune.comparing.results import CellResult
from deltatune.comparing.statistics import mean_interval
from deltatune.files import read_json, write_text
from deltatune.methods.describe import describe
from deltatune.models.adapters import ABOUT, CONFIG
from deltatune.packages import PACKAGES

CARD = "README.md"


def write_card(folder: Path, cell: Cell, result: CellResult) -> None:
    """Writes README.md into the adapter's folder: what it is, how good, how to load it and how to make it again."""
    about, peft_type = read_json(folder / ABOUT), str(read_json(folder / CONFIG)["peft_type"])
    in_peft = not peft_type.startswith("DELTATUNE") and not about["base"]["storage"]
    front = yaml.safe_dump(_front(cell, result, about, in_peft), sort_keys=False, allow_unicode=True)
    write_text(folder / CARD, f"---\n{front}---\n\n" + "\n".join(_page(cell, result, about, in_peft)))


def _front(cell: Cell, result: CellResult, about: Mapping[str, Any], in_peft: bool) -> dict[str, Any]:
    """What the hub's index reads. The names of local folders and files are not ids of the hub and are left out."""
    classifies = about["task"] == "classification"
    base, data = about["base"]["id"], cell.data.name
    front = {
        "library_name": "peft" if in_peft else "deltatune",
        "base_model": base if _has_public_name(base) else None,
        "base_model_relation": "adapter" if _has_public_name(base) else None,
        "datasets": [data] if _has_public_name(data) else None,
        "pipeline_tag": "text-classification" if classifies else "text-generation",
        "tags": ["deltatune", "adapter", result.method],
        "model-index": [
            {
                "name": result.label,
                "results": [
                    {
                        "task": {"type": "text-classification" if classifies else "text-generation"},
                        "dataset": {"name": Path(data).name, "type": Path(data).name, "split": "test"},
                        "metrics": [{"type": name, "value": value} for name, value in result.test.items()],
                    }
                ],
            }
        ],
    }
    return {key: value for key, value in front.items() if value is not None}


def _has_public_name(name: str) -> bool:
    return name in PACKAGES or (name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists())


def _page(cell: Cell, result: CellResult, about: Mapping[str, Any], in_peft: bool) -> Iterator[str]:
    base, method = about["base"], describe(result.method)
    source = f" ({method['paper']})" if method["paper"] else ""
    yield f"# {result.label} on {Path(base['id']).name}\n"
    yield f"An adapter made with Deltatune, by {method['title']}{source}. {method['summary']}"
    share = table.small_percent(result.trainable / result.total)
    stored = table.size(result.adapter_bytes)
    yield f"It has {result.trainable:,} trained parameters, {share} of the model's, and takes {stored} on disk.\n"
    yield from _facts(cell, result, about)
    yield from _scores(cell, result)
    yield from _use(about, in_peft)
    yield from _again(cell)


def _facts(cell: Cell, result: CellResult, about: Mapping[str, Any]) -> Iterator[str]:
    base, data, training = about["base"], about["data"], about["training"]
    stored = ", ".join(f"{target} in {how}" for target, how in base["storage"].items())
    yield "| | |\n|---|---|"
    yield f"| Base | {_cell(base['id'])}{_revision(base['revision'])}{f', {_cell(stored)}' if stored else ''} |"
    yield f"| Data | {_cell(cell.data.name)}{_revision(data['revision'])} |"
    if labels := about.get("labels"):
        yield f"| Labels | {_cell(', '.join(labels))} |"
    options = ", ".join(f"{name}={value}" for name, value in result.options.items())
    yield f"| Method | {_cell(result.method)}{f': {_cell(options)}' if options else ''} |"
    yield (
        f"| Training | {training['epochs']:g} epochs, {result.steps:,} steps, peak learning rate "
        f"{training['learning_rate']:g}, {training['optimiser']}, seed {result.seed}, {result.precision} |"
    )
    yield f"| It took | {table.seconds(result.train_seconds)} and {table.size(result.peak_bytes)} of memory |"
    for kind, name in (("base", base["id"]), ("data", cell.data.name)):
        if name in PACKAGES:
            yield f"| Licence of the {kind} | {PACKAGES[name].licence} |"
    yield ""


def _scores(cell: Cell, result: CellResult) -> Iterator[str]:
    yield f"## Scores\n\nOn {len(result.test_values):,} test examples that no training and no choice saw.\n"
    yield "| | Test | 95% interval | Validation |\n|---|---:|---:|---:|"
    for name in dict.fromkeys((*result.test, *result.validation)):
        show = table.percent if named(name).share else lambda value: f"{value:.3f}"
        interval = table.interval_text(mean_interval([result])) if name == result.metric else ""
        test, validation = (show(part[name]) if name in part else "" for part in (result.test, result.validation))
        yield f"| {named(name).title} | {test} | {interval} | {validation} |"
    yield "\nThe interval covers the choice of test examples, not the luck of the seed.\n"


def _use(about: Mapping[str, Any], in_peft: bool) -> Iterator[str]:
    base, labels, storage = about["base"], about.get("labels", []), about["base"]["storage"]
    command = "predict" if about["task"] == "classification" else "chat"
    given = [repr(base["id"]), *([f"labels={list(labels)!r}"] if labels else [])]
    given += [f"storage={storage!r}"] if storage else []
    if len(base["revision"]) == 40:
        given.append(f"revision={base['revision']!r}")
    loading = f"import deltatune\n\nbase = deltatune.load({', '.join(given)})"
    yield f"## Use\n\n```console\n$ deltatune {command} THIS-FOLDER\n```\n"
    yield f'```python\n{loading}\nmodel = deltatune.load_adapter(base.model, "THIS-FOLDER")\n```\n'
    if in_peft:
        yield "The files are in PEFT's form, so that it loads them as well:\n"
        loading = f"from peft import PeftModel\n{loading}"
        yield f'```python\n{loading}\nmodel = PeftModel.from_pretrained(base.model, "THIS-FOLDER")\n```\n'


def _again(cell: Cell) -> Iterator[str]:
    base = f"{cell.base}@{cell.base_revision}" if len(cell.base_revision) == 40 and "@" not in cell.base else cell.base
    again = Experiment(
        base=base,
        data=cell.data,
        methods=(cell.method,),
        seeds=(cell.seed,),
        training=cell.training,
        decoding=cell.decoding,
        new_tokens=cell.new_tokens,
    )
    content = yaml.safe_dump(again.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)
    installed = f"pip install deltatune=={version('deltatune')}"
    yield f"## Make it again\n\nWith `{installed}` and these lines as `experiment.yaml`:\n"
    yield f"```console\n$ deltatune compare experiment.yaml\n```\n\n```yaml\n{content}```\n"


def _revision(revision: str) -> str:
    return f" ({_cell(revision)})" if revision else ""


def _cell(words: str) -> str:
    """Words in a cell of a Markdown table: nothing in them ends it or is read as markup."""
    return "".join(f"\\{letter}" if letter in r"\|*_`<>[]" else letter for letter in " ".join(words.split()))
