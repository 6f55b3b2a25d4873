"""Using what was trained: a saved adapter on its base, scored on data or labelling new texts."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from deltatune.data import Split, TextData, load_data
from deltatune.data.dialogues import Dialogues
from deltatune.data.tokens import length_limit
from deltatune.errors import UserError
from deltatune.models.adapters import SavedAdapter, load_adapter, read_adapter
from deltatune.models.base import Base, load
from deltatune.models.places import find_base
from deltatune.models.vocabulary import add_tokens
from deltatune.training.pieces import quicken
from deltatune.training.precision import Computed, Precision, prepare, resolve
from deltatune.training.task import Scores
from deltatune.training.tasks import check_task, task_for

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Ready:
    """A saved adapter on its base, ready to be used."""

    saved: SavedAdapter
    base: Base
    precision: Computed
    max_length: int

    def scores(self, split: Split | Dialogues) -> Scores:
        """Scores on a split; the labels of a classifier's are numbered as the adapter's.

        Raises `UserError` for single texts where it was trained on pairs, and the other way round.
        """
        pairs = isinstance(split, Split) and split.pairs is not None
        if self.saved.about.get("pairs", pairs) != pairs:
            raise UserError(
                f"this adapter was trained on {'single texts' if pairs else 'pairs of texts'}",
                f"give {'one text' if pairs else 'two texts'} for each label",
            )
        task = task_for(self.base, self.precision)
        return task.evaluate(task.encode(split, self.max_length))


def open_adapter(folder: Path, *, base: str = "", precision: str = "") -> Ready:
    """Loads a saved adapter on its base; computes as it was trained unless `precision` says otherwise.

    `base` stands in for the recorded one where that is not found under its name; its weights must be the same.
    """
    saved = read_adapter(folder)
    if not (base or saved.base):
        raise UserError(f"{saved.folder} does not say which base it is for", "name it with --base")
    revision = "" if base else saved.revision
    try:
        find_base(base or saved.base, revision)
    except UserError as error:
        hint = error.hint if base else f"{saved.folder} was trained on it; say where it is now with --base"
        raise UserError(error.message, hint) from error
    loaded = load(base or saved.base, revision=revision, labels=saved.labels, storage=saved.storage)
    if texts := list(filter(None, saved.new_tokens.values())):
        add_tokens(loaded, texts)
    load_adapter(loaded.model, saved)
    trained = saved.about.get("training", {}).get("precision", "auto")
    computed = resolve(cast(Precision, precision or trained))
    prepare(loaded.model, computed)
    virtual = getattr(saved.method, "virtual_tokens", 0)
    limit = length_limit(loaded.tokenizer, loaded.model.config, saved.about.get("max_length", 256), virtual)
    quicken(loaded.model, limit)
    return Ready(saved, loaded, computed, limit)


def score(ready: Ready, name: str, split: str, text: tuple[str, ...] = (), label: str = "") -> Scores:
    """Scores a saved adapter on a split of the named data, or of the very rows that it was trained and tested on."""
    if split not in (*SPLITS, "all"):
        raise UserError(f"there is no split '{split}'", f"use {', '.join(SPLITS)} or all")
    trained_on = ready.saved.about.get("data", {})
    if not (name or trained_on):
        raise UserError("this adapter does not say what it was trained on", "name the data with --data")
    words: dict[str, Any] = {}
    if not name or trained_on.get("name") in (name, str(Path(name).resolve())):
        text, label = text or tuple(trained_on["text"]), label or trained_on["label"]
        words = {key: trained_on[key] for key in ("task", "system", "template") if trained_on.get(key)}
    data = load_data(name or trained_on["name"], text=text, label=label, **words)
    check_task(ready.base, data)
    if not name:
        if data.revision != trained_on["revision"]:
            raise UserError(
                f"the data '{data.name}' changed since this adapter was trained on it",
                "its test rows may be ones that it was trained on; name it with --data to score it all the same",
            )
        data = data.limited(trained_on["train"], trained_on["validation"], trained_on["test"], seed=0)
    names = SPLITS if split == "all" else (split,)
    if isinstance(data, TextData):
        return ready.scores(_joined([_renumbered(getattr(data, part), data, ready.saved) for part in names]))
    return ready.scores(Dialogues([example for part in names for example in getattr(data, part).examples]))


def predict(ready: Ready, texts: Split) -> Iterator[dict[str, Any]]:
    """The label of each text and its probability, in order."""
    for place, said in enumerate(ready.scores(texts).outputs):
        pair = {} if texts.pairs is None else {"pair": texts.pairs[place]}
        label = ready.saved.labels[said["prediction"]]
        yield {"text": texts.texts[place], **pair, "label": label, "probability": said["probability"]}


def read_lines(source: str) -> list[tuple[str, str]]:
    """The lines of a file, or of stdin for `-`, each with where it stands, in words. Empty lines are left out."""
    name = "stdin" if source == "-" else source
    try:
        content = (sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()).decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"could not read {name}: {error.strerror}", "name a file of texts, or - for stdin") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not in UTF-8: {error.reason} at byte {error.start}", "save it as UTF-8") from error
    # Only a line feed ends a line: JSON may hold the other characters that `splitlines` would split at.
    lines = [(f"line {n} of {name}", line) for n, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{name} has no text", "give one text a line")
    return lines


def read_texts(lines: Sequence[tuple[str, str]]) -> Split:
    """The texts of lines of `read_lines`: each plain, or JSON with "text" and, for pairs, "pair"."""
    rows = [_row(line, where) for where, line in lines]
    paired = [row for row in rows if len(row) == 2]
    if paired and len(paired) != len(rows):
        raise UserError("some lines have a pair and some have none", "give a pair on every line or on none")
    pairs = [row[1] for row in paired] or None
    return Split([row[0] for row in rows], [0] * len(rows), pairs)


def _row(line: str, where: str) -> tuple[str, ...]:
    if not line.lstrip().startswith("{"):
        return (line.strip(),)
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}", 'write it as {"text": "…"}') from error
    row = tuple(fields[key] for key in ("text", "pair") if key in fields)
    if "text" not in fields or not all(isinstance(text, str) for text in row):
        raise UserError(f'{where} has no "text" that is a string', 'write it as {"text": "…"}')
    return row


def _renumbered(split: Split, data: TextData, saved: SavedAdapter) -> Split:
    """The split with the adapter's label numbers; another data set may order the same names otherwise."""
    unknown = [data.labels[number] for number in sorted(set(split.labels)) if data.labels[number] not in saved.labels]
    if unknown:
        raise UserError(
            f"the data has the label '{unknown[0]}', which this adapter was not trained on",
            f"it knows: {', '.join(saved.labels)}",
        )
    return Split(split.texts, [saved.labels.index(data.labels[number]) for number in split.labels], split.pairs)


def _joined(splits: Sequence[Split]) -> Split:
    pairs = None if splits[0].pairs is None else [pair for split in splits for pair in split.pairs or []]
    return Split([t for split in splits for t in split.texts], [n for split in splits for n in split.labels], pairs)
