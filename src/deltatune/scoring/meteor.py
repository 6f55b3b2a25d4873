"""METEOR of matching words and stems, by NLTK.

Satanjeev Banerjee, Alon Lavie, *METEOR: An Automatic Metric for MT Evaluation with Improved Correlation with Human
Judgments*, ACL workshop 2005.
"""

from collections.abc import Sequence

from deltatune.scoring.tokens import Words


class _NoSynonyms:
    """Stands in for WordNet, whose data is no package: a word has no synonyms."""

    def synsets(self, word: str) -> tuple[()]:
        return ()


def meteor(texts: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """METEOR of each text, from 0 to 1, against the reference that gives most; the figure of a corpus is their mean.

    10PR / (R + 9P) · (1 - 0.5 (chunks / matches)³), over words that match exactly, then by their Porter stems. It is
    not the METEOR 1.5 of the E2E challenge and of caption papers, which knows synonyms and paraphrases and weighs
    words: its figures are others. Where a word stands several times, NLTK pairs from the end, which can give more
    chunks, and so a lower figure, than the paper's alignment with fewest crossings.
    """
    from nltk.stem.porter import PorterStemmer
    from nltk.translate.meteor_score import meteor_score

    stemmer, synonyms = PorterStemmer(), _NoSynonyms()
    return [
        float(meteor_score(theirs, text, stemmer=stemmer, wordnet=synonyms)) if any(theirs) else 0.0
        for text, theirs in zip(texts, references, strict=True)
    ]
