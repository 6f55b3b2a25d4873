"""TRL's SFTTrainer with peft, as documented and tuned."""

from pathlib import Path
from typing import Any

from trl import SFTConfig, SFTTrainer

from race.contestants import Contestant
from race.trainer import TakesTurns, adapted, arguments, examples, finish, loaded, lora
from race.turns import Turn


class TunedSFT(TakesTurns, SFTTrainer):
    """TRL's trainer that takes turns."""


def run(work: dict[str, Any], entry: Contestant, turn: Turn) -> None:
    """Trains with the entry's settings; without any, with TRL's own: model by name, peft_config, and no more."""
    folder, settings = Path(work["folder"]), entry.settings
    train, validation = (examples(work, None, split, settings) for split in ("train", "validation"))
    given = arguments(
        work, entry if settings else Contestant("", "", "", {"bf16": None, "gradient_checkpointing": True})
    )
    config = SFTConfig(**given, per_device_train_batch_size=work["batch"], max_length=work["max_length"])
    if settings:
        trainer = TunedSFT(adapted(loaded(work, settings), work, settings), config, train_dataset=train)
    else:
        trainer = TunedSFT(str(folder / "base"), config, train_dataset=train, peft_config=lora(work, settings))
    trainer.batches = work["batches"] if entry.same_batches else None
    finish(trainer, work, turn, validation)
