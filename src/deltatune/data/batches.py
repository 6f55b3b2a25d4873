"""Batches by token budget from length-sorted, shuffled windows: examples of like length together, little padding.

An epoch is shuffled, cut into windows, each window sorted by length and cut into batches that fit the budget, and the
batches are shuffled again. Which examples meet is random to the size of a window; the same seed gives the same order.

Few shapes occur: for every new one the library of a processor makes new kernels, which takes time and stays in memory.
Rows have a multiple of 8 tokens, and as many rows as fit are together: longest first, so that the first says how many.
Which examples are together is the same on every machine; where products are our own, which take any shape, rows are
filled no further than the longest of them needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from deltatune.data.sequences import UNSCORED, Sequences
from deltatune.data.tokens import Tokens

_WINDOW = 1024
"""Examples that are sorted together: enough for even lengths, few enough to leave the order random."""
STEP = 8
"""Tokens by which padded lengths differ; with 4 steps are as fast and a run holds a third more memory."""
ROWS = 32
"""Rows by which products differ where their number is free: those of packed texts, and those of scored tokens."""


@dataclass(frozen=True)
class Batch:
    """Some examples, padded on the right to one length."""

    inputs: dict[str, Int[Tensor, "examples _"]]
    """What the model takes, the attention mask included."""
    labels: Int[Tensor, " examples"] | Int[Tensor, "examples length"]
    """One for each example, or a target for each token: UNSCORED where nothing is to be learnt."""
    indices: tuple[int, ...]
    """Places of the examples in their split."""
    tokens: int
    """Real tokens, padding not counted."""
    units: int
    """What the loss is the mean over: examples, or scored tokens."""


def padded_length(length: int, longest: int, step: int = STEP) -> int:
    """The next multiple of `step`; no more than the longest example has: a model may have no places for more."""
    return min(-(-length // step) * step, longest)


def epoch(lengths: Sequence[int], budget: int, generator: np.random.Generator) -> list[list[int]]:
    """The batches of one epoch as lists of places; each holds at most `budget` tokens, padding included.

    An example longer than the budget stands alone.
    """
    order = generator.permutation(len(lengths))
    padded = _padded_lengths(lengths)
    batches: list[list[int]] = []
    for start in range(0, len(order), _WINDOW):
        window = sorted(order[start : start + _WINDOW].tolist(), key=lambda place: -lengths[place])
        batches += in_order(padded, budget, window)
    return [batches[place] for place in generator.permutation(len(batches))]


def in_order(lengths: Sequence[int], budget: int, places: Sequence[int]) -> list[list[int]]:
    """Cuts `places`, the longest first, into batches that fit the budget."""
    batches: list[list[int]] = []
    for place in places:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


def collate(tokens: Tokens, places: Sequence[int], pad: int, step: int = STEP) -> Batch:
    """The examples at `places` as tensors padded to a multiple of `step`."""
    examples = [tokens.fields[place] for place in places]
    lengths = [len(example["input_ids"]) for example in examples]
    width = padded_length(max(lengths), tokens.longest, step)
    inputs = {
        name: _padded([example[name] for example in examples], width, pad if name == "input_ids" else 0)
        for name in examples[0]
    }
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]  # (examples, length)
    labels = torch.tensor([tokens.labels[place] for place in places])
    return Batch({**inputs, "attention_mask": mask.long()}, labels, tuple(places), sum(lengths), len(places))


def collate_sequences(sequences: Sequences, places: Sequence[int], pad: int, step: int = STEP) -> Batch:
    """As `collate`; a decoder's targets stand under its input, others by themselves."""
    inputs = [sequences.inputs[place] for place in places]
    targets = [sequences.targets[place] for place in places]
    lengths = torch.tensor([len(ids) for ids in inputs])
    width, wide = (padded_length(max(map(len, rows)), sequences.longest, step) for rows in (inputs, targets))
    return Batch(
        inputs={
            "input_ids": _padded(inputs, width, pad),
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
        },
        labels=_padded(targets, wide, UNSCORED),
        indices=tuple(places),
        tokens=sum(sequences.lengths[place] for place in places),
        units=sum(target != UNSCORED for row in targets for target in row),
    )


def by_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Every example once, sorted by length, in batches that fit the budget: for scoring, in which order is nothing."""
    longest_first = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return in_order(_padded_lengths(lengths), budget, longest_first)


def _padded_lengths(lengths: Sequence[int]) -> list[int]:
    longest = max(lengths, default=0)
    return [padded_length(length, longest) for length in lengths]


def _padded(rows: list[list[int]], width: int, value: int) -> Int[Tensor, "examples width"]:
    out = torch.full((len(rows), width), value)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return out
