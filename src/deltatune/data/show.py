"""What a data set holds, and how a base would read its examples: for people to look at before they train."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from deltatune.data.dialogues import DialogueData, Dialogues
from deltatune.data.encode import encode
from deltatune.data.examples import Split, TextData
from deltatune.data.sequences import UNSCORED, Sequences
from deltatune.data.splits import SPLITS
from deltatune.data.tokens import length_limit
from deltatune.errors import UserError, unknown

_COUNTED = 1000
"""So many examples at most say how long the examples of a split are."""


def show(
    data: TextData | DialogueData, *, split: str = "train", count: int = 3, base: str = "", max_length: int = 256
) -> dict[str, Any]:
    """The data set in JSON's types: where it is from, its sizes, and the first `count` examples of a split.

    Each example for generation is a list of parts, scored or not: its turns, or, with a `base`, its tokens as text, at
    most `max_length` of them, with their counts. Each for classification is a text, or a pair, with its label.
    Raises UserError for a split that is none, a base that is none or cannot generate, and what `encode` refuses.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if isinstance(data, TextData) and base:
        raise UserError(f"'{data.name}' is for classification: no base is needed to show it", "leave out --base")
    about: dict[str, Any] = {
        "name": data.name,
        "task": data.task,
        "revision": data.revision,
        "text": list(data.text),
        "label": data.label,
        "examples": {name: len(getattr(data, name)) for name in SPLITS},
        "splitting": data.splitting,
        "duplicates": data.duplicates,
        "incomplete": data.incomplete,
        "split": split,
    }
    if isinstance(data, TextData):
        part: Split = getattr(data, split)
        return about | {"labels": list(data.labels), "shown": _labelled(part, data.labels, count)}
    dialogues: Dialogues = getattr(data, split)
    if not base:
        return about | {"shown": _turns(dialogues, count)}
    tokenizer, limit, encoder_decoder = _reader(base, max_length)
    some = dialogues.take(range(min(len(dialogues), max(count, _COUNTED))))
    sequences = encode(some, tokenizer, limit=limit, encoder_decoder=encoder_decoder)
    shown = [
        {"row": example.row, **_tokens(sequences, place, tokenizer, encoder_decoder)}
        for place, example in enumerate(some.examples[:count])
    ]
    return about | {"base": base, "tokens": _figures(sequences, limit), "shown": shown}


def _reader(base: str, max_length: int) -> tuple[PreTrainedTokenizerBase, int, bool]:
    """The base's tokenizer, the most tokens it reads, and whether it is an encoder–decoder; no weights are read."""
    from deltatune.models.base import outline, read_tokenizer
    from deltatune.models.places import find_base

    place = find_base(base)
    model = outline(place)
    tokenizer = read_tokenizer(place, model)
    return tokenizer, length_limit(tokenizer, model.config, max_length), bool(model.config.is_encoder_decoder)


def _labelled(part: Split, labels: tuple[str, ...], count: int) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = [
        {"text": text, "label": labels[label]} for text, label in zip(part.texts[:count], part.labels, strict=False)
    ]
    for example, pair in zip(shown, part.pairs or (), strict=False):
        example["pair"] = pair
    return shown


def _turns(part: Dialogues, count: int) -> list[dict[str, Any]]:
    return [
        {
            "row": example.row,
            "parts": [{"role": turn.role, "text": turn.content, "scored": turn.scored} for turn in example.turns],
        }
        for example in part.examples[:count]
    ]


def _tokens(
    sequences: Sequences, place: int, tokenizer: PreTrainedTokenizerBase, encoder_decoder: bool
) -> dict[str, Any]:
    read, learnt = sequences.inputs[place], sequences.targets[place]
    if encoder_decoder:
        read, learnt = [*read, *learnt], [*([UNSCORED] * len(read)), *learnt]
    ends = [end for end in range(1, len(read)) if (learnt[end - 1] == UNSCORED) != (learnt[end] == UNSCORED)]
    parts, start, before = [], 0, ""
    for end in (*ends, len(read)):
        # The end of a longer text, not a text of its own: some tokenizers take the space off a text's beginning.
        whole = tokenizer.decode(read[:end], clean_up_tokenization_spaces=False)
        text = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(read[start:end])
        parts.append({"text": text, "scored": learnt[start] != UNSCORED})
        start, before = end, whole
    return {"tokens": len(read), "scored": sum(target != UNSCORED for target in learnt), "parts": parts}


def _figures(sequences: Sequences, limit: int) -> dict[str, Any]:
    """How long the examples are, and how many were too long; tokens are counted as the model computes with them."""
    scored = [sum(target != UNSCORED for target in targets) for targets in sequences.targets]
    count = max(1, len(sequences))
    return {
        "counted": len(sequences),
        "limit": limit,
        "mean": sum(sequences.lengths) / count,
        "longest": max(sequences.lengths, default=0),
        "scored": sum(scored) / count,
        "truncated": sequences.truncated,
    }
