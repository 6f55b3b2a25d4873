"""Transformers' Trainer with peft, as taught and tuned."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from race.contestants import Contestant
from race.turns import Turn

UNSCORED = -100
Rows = Sequence[Mapping[str, Any]]


class TakesTurns:
    """Mixed into a Trainer: takes given batches, if any, and tells what each step trained on."""

    batches: list[list[int]] | None = None
    seen: dict[str, Any]

    def get_train_dataloader(self) -> DataLoader:
        """The given batches in their order."""
        if self.batches is None:
            return super().get_train_dataloader()  # type: ignore[misc]
        return DataLoader(self.train_dataset, batch_sampler=self.batches, collate_fn=self.data_collator)  # type: ignore[attr-defined]

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *rest: Any) -> Tensor:
        """A step as it is, noted."""
        examples, tokens = len(inputs["input_ids"]), int(inputs["attention_mask"].sum())
        loss: Tensor = super().training_step(model, inputs, *rest)  # type: ignore[misc]
        self.seen = {"examples": examples, "tokens": tokens, "loss": loss.item()}
        return loss


class HandsOver(TrainerCallback):
    """Hands over the turn at the end of each step."""

    def __init__(self, turn: Turn, trainer: TakesTurns) -> None:
        self._turn, self._trainer = turn, trainer

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The step is done."""
        self._turn.done(**self._trainer.seen)


class TunedTrainer(TakesTurns, Trainer):
    """Transformers' Trainer that takes turns."""


def run(work: dict[str, Any], entry: Contestant, turn: Turn) -> None:
    """Trains with the entry's settings."""
    settings, folder = entry.settings, Path(work["folder"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = adapted(loaded(work, settings), work, settings)
    train, validation = (examples(work, tokenizer, split, settings) for split in ("train", "validation"))
    trainer = TunedTrainer(
        model,
        TrainingArguments(**arguments(work, entry), per_device_train_batch_size=work["batch"]),
        train_dataset=train,
        data_collator=Padded(tokenizer.pad_token_id, settings.get("pad_to")),
    )
    trainer.batches = work["batches"] if entry.same_batches else None
    finish(trainer, work, turn, validation)


def finish(trainer: Any, work: dict[str, Any], turn: Turn, validation: Rows) -> None:
    """Trains, and says at the end how many parameters did and how good they are."""
    trainer.add_callback(HandsOver(turn, trainer))
    trainer.train()
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    pad = trainer.model.config.pad_token_id or 0
    bf16 = trainer.args.bf16
    turn.say(finished=True, trainable=trained, quality=quality(trainer.model, validation, work, pad, bf16))


def loaded(work: dict[str, Any], settings: Mapping[str, Any]) -> nn.Module:
    """The base."""
    auto = AutoModelForSequenceClassification if work["labels"] else AutoModelForCausalLM
    options: dict[str, Any] = {"dtype": getattr(torch, settings["dtype"]), "attn_implementation": settings["attention"]}
    if settings.get("nf4"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model: nn.Module = auto.from_pretrained(Path(work["folder"]) / "base", **options)
    model.config.use_cache = False
    return model


def lora(work: dict[str, Any], settings: Mapping[str, Any]) -> LoraConfig:
    """The same adapter as ours."""
    return LoraConfig(
        task_type="SEQ_CLS" if work["labels"] else "CAUSAL_LM",
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules="all-linear",
        use_dora=bool(settings.get("dora")),
    )


def adapted(model: nn.Module, work: dict[str, Any], settings: Mapping[str, Any]) -> nn.Module:
    """The base with its adapter; what trains is in fp32, the head too."""
    model = get_peft_model(model, lora(work, settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def examples(work: dict[str, Any], tokenizer: Any, split: str, settings: Mapping[str, Any]) -> Any:
    """Texts tokenised here as taught; what a language model learns from comes as token ids."""
    folder = Path(work["folder"])
    if not work["labels"]:
        return load_dataset("json", data_files=str(folder / "tokens" / f"{split}.jsonl"), split="train")
    texts = load_dataset("json", data_files=str(folder / "data" / f"{split}.jsonl"), split="train")
    names, pad_to = work["labels"], settings.get("pad_to")

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        padding = {"padding": "max_length", "max_length": pad_to} if pad_to else {"max_length": work["max_length"]}
        return {
            **tokenizer(rows["text"], truncation=True, **padding),
            "labels": [names.index(label) for label in rows["label"]],
        }

    return texts.map(encode, batched=True, remove_columns=texts.column_names)


def arguments(work: dict[str, Any], entry: Contestant) -> dict[str, Any]:
    """What both trainers are told."""
    return {
        "output_dir": f"{work['folder']}/trained",
        "learning_rate": work["learning_rate"],
        "weight_decay": 0.01,
        "num_train_epochs": 1,
        "max_steps": work["steps"],
        "warmup_steps": round(0.06 * work["steps"]),
        "bf16": entry.settings["bf16"],
        "gradient_checkpointing": bool(entry.settings.get("gradient_checkpointing")),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": work["seed"],
    }


class Padded:
    """Examples as a batch, padded on the right to the longest, or to a fixed length."""

    def __init__(self, pad: int, length: int | None = None) -> None:
        self._fill = {"input_ids": pad, "labels": UNSCORED}
        self._length = length

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        """Rows of token ids → tensors (examples, length)."""
        rows = [{"attention_mask": [1] * len(row["input_ids"]), **row} for row in rows]
        batch = {}
        for name, first in rows[0].items():
            if isinstance(first, int):
                batch[name] = torch.tensor([row[name] for row in rows])
                continue
            length = max(self._length or 0, *(len(row[name]) for row in rows))
            fill = self._fill.get(name, 0)
            batch[name] = torch.tensor([[*row[name], *[fill] * (length - len(row[name]))] for row in rows])
        return batch


@torch.no_grad()
def quality(model: nn.Module, rows: Rows, work: dict[str, Any], pad: int, bf16: bool) -> dict[str, float]:
    """Loss, and accuracy of a classifier, over the validation split: of each example, or of each scored token."""
    model.eval()
    total, right, count = 0.0, 0, 0
    for batch in _in_eights(rows, Padded(pad)):
        labels = batch.pop("labels")
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(**batch).logits.float()
        if logits.ndim == 3:
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        total += F.cross_entropy(logits, labels, ignore_index=UNSCORED, reduction="sum").item()
        right += int((logits.argmax(-1) == labels).sum())
        count += int((labels != UNSCORED).sum())
    found = {"loss": total / count, "accuracy": right / count}
    return {name: found[name] for name in work["quality"]}


def _in_eights(rows: Any, collate: Padded) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(rows), 8):
        yield collate([rows[place] for place in range(start, min(start + 8, len(rows)))])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A JSONL file's rows."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
