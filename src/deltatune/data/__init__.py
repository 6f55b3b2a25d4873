"""From a data set's name to examples in three splits: texts with labels, or dialogues to learn to write."""

from deltatune.data.dialogues import Dialogue, DialogueData, Dialogues, Turn
from deltatune.data.embedded import EMBEDDED
from deltatune.data.examples import Split, TextData
from deltatune.data.load import load_data

__all__ = ["EMBEDDED", "Dialogue", "DialogueData", "Dialogues", "Split", "TextData", "Turn", "load_data"]
