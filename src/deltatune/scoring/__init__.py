"""How good generated texts are: held against reference texts by the measures that papers report."""

from deltatune.scoring.texts import TextScores, score_texts

__all__ = ["TextScores", "score_texts"]
