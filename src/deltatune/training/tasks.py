"""Which task a base is for."""

from collections.abc import Collection

from deltatune.data import DialogueData, TextData
from deltatune.errors import UserError
from deltatune.models.base import Base
from deltatune.training.classification import Classification
from deltatune.training.language import LanguageModelling
from deltatune.training.pieces import Piece
from deltatune.training.precision import Computed
from deltatune.training.task import Task


def task_for(base: Base, precision: Computed, plain: Collection[Piece] = ()) -> Task:
    """The task that the base was loaded for, without the fast pieces named in `plain`."""
    if base.task == "generation":
        return LanguageModelling(base, precision, packs="packing" not in plain, shares="sharing" not in plain)
    return Classification(base, precision)


def check_task(base: Base, data: TextData | DialogueData) -> None:
    """Raises `UserError` where the data is for another task than the base was loaded for."""
    if base.task != data.task:
        wanted = "with the labels of the data" if data.task == "classification" else "without labels"
        raise UserError(
            f"'{data.name}' is data for {data.task}, and '{base.id}' was loaded for {base.task}",
            f"load the base {wanted}, or choose other data",
        )
