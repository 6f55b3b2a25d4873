"""What is raced over: base, examples and batches, written to a folder from which every contestant reads the same."""

import json
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

import deltatune
from deltatune import Training
from deltatune.training.loop import _plan
from deltatune.training.task import Examples
from deltatune.training.tasks import task_for

SEED = 0


@dataclass(frozen=True)
class Work:
    """One base and data set."""

    what: str
    base: str
    data: str
    batch: int
    """Examples of a step: the peers' batch, and the mean of ours."""
    steps: int
    quick: int
    """Steps of a run that only tries everything out."""
    warm: float
    """Share of the steps that is left out of the times: heaps grow, caches fill."""
    max_length: int
    learning_rate: float
    quality: tuple[str, ...]
    validation: int
    starts: int
    """Fresh starts of each, beside that to the race itself, for the seconds to the first step."""


WORKS: Mapping[str, Work] = {
    "minilm": Work(
        "MiniLM on rotten-tomatoes, LoRA r=8 on all linears, batches of 32",
        *("minilm", "rotten-tomatoes", 32, 60, 6, 1 / 3, 128, 1e-3, ("loss", "accuracy"), 500, 3),
    ),
    "smollm2": Work(
        "SmolLM2 on docstrings, LoRA r=8 on all linears, batches of 8",
        *("smollm2", "docstrings", 8, 24, 2, 1 / 4, 256, 2e-4, ("loss",), 60, 1),
    ),
    **{
        name: Work(
            f"SmolLM2 on 8 texts of 128 tokens, all of them scored: {what}",
            *("smollm2", "", 8, 20, 2, 1 / 4, 128, 2e-4, ("loss",), 8, 0),
        )
        for name, what in (
            ("smollm2-8x128", "LoRA r=8 and its limit"),
            ("smollm2-dora", "DoRA r=8"),
            ("smollm2-qlora", "QLoRA r=8 over NF4"),
        )
    },
}


def write(name: str, folder: Path, quick: bool) -> dict[str, Any]:
    """Writes a work's base, examples and batches; gives what contestants read of it in work.json."""
    work = WORKS[name]
    steps = work.quick if quick else work.steps
    transformers_logging.disable_progress_bar()
    few = min(work.validation, 8) if quick else work.validation
    _write_data(work, folder / "data", steps * work.batch, few)
    data = deltatune.load_data(str(folder / "data"))
    labels = list(getattr(data, "labels", ()))
    # As each is published: MiniLM in fp32, SmolLM2 in bf16.
    base = deltatune.load(work.base, labels=labels, dtype=torch.float32 if labels else torch.bfloat16)
    base.model.save_pretrained(folder / "base")
    base.tokenizer.save_pretrained(folder / "base")
    task = task_for(base, "fp32")
    encoded = {part: task.encode(getattr(data, part), work.max_length) for part in ("train", "validation")}
    train = encoded["train"]
    if not labels:
        for part, split in encoded.items():
            rows = ({"input_ids": i, "labels": t} for i, t in zip(split.inputs, split.targets, strict=True))
            _write_lines(folder / "tokens" / f"{part}.jsonl", rows)
    budget, batches = _even(train, steps)
    facts = {
        "labels": labels,
        "batch": work.batch,
        "steps": len(batches),
        "batch_tokens": budget,
        "batches": batches,
        "tokens_a_step": sum(train.lengths) // len(batches),
        "max_length": work.max_length,
        "learning_rate": work.learning_rate,
        "quality": work.quality,
        "seed": SEED,
    }
    (folder / "work.json").write_text(json.dumps(facts))
    return facts


def _even(examples: Examples, steps: int) -> tuple[int, list[list[int]]]:
    """The smallest budget of tokens with which an epoch of ours has at most so many steps; and their batches."""
    low, high = max(examples.lengths), sum(examples.lengths)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_batches(examples, middle)) <= steps else (middle + 1, high)
    return low, _batches(examples, low)


def _batches(examples: Examples, budget: int) -> list[list[int]]:
    """The batches of `deltatune.tune`, in its order."""
    return [group[0] for group in _plan(examples, Training(epochs=1, batch_tokens=budget), SEED)]


def _write_data(work: Work, folder: Path, train: int, validation: int) -> None:
    limits = {"train": train, "validation": validation, "test": 8}
    if not work.data:
        texts = _library_texts()
        for part, count in limits.items():
            _write_lines(folder / f"{part}.jsonl", ({"text": next(texts)} for _ in range(count)))
        return
    data = deltatune.load_data(work.data).limited(**limits, seed=SEED)
    for part in limits:
        split = getattr(data, part)
        if data.task == "classification":
            rows = [
                {"text": text, "label": data.labels[label]}
                for text, label in zip(split.texts, split.labels, strict=True)
            ]
        else:
            rows = [{"prompt": one.turns[0].content, "completion": one.turns[-1].content} for one in split.examples]
        _write_lines(folder / f"{part}.jsonl", rows)


def _library_texts() -> Iterable[str]:
    """Pieces of the standard library's sources, each longer than 128 tokens."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="ignore")
        yield from (source[start : start + 2000] for start in range(0, len(source) - 2000, 2000))


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows), encoding="utf-8")
