"""From a data set's name to texts with labels in three splits."""

from deltatune.data.embedded import EMBEDDED
from deltatune.data.examples import Split, TextData
from deltatune.data.load import load_data

__all__ = ["EMBEDDED", "Split", "TextData", "load_data"]
