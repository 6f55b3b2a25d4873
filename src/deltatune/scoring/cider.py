"""CIDEr-D: how far a text agrees with what its references have in common and other examples' references have not.

Ramakrishna Vedantam, C. Lawrence Zitnick, Devi Parikh, *CIDEr: Consensus-based Image Description Evaluation*, arXiv
1411.5726; as the scripts of COCO captions compute it, which call it CIDEr.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from deltatune.scoring.tokens import Words, ngrams

_SIGMA = 6.0
_LONGEST = 4

Vector = dict[tuple[str, ...], float]


def cider(texts: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """CIDEr-D of each text, from 0 to 10; the figure of a corpus is their mean.

    For each n from 1 to 4, averaged (section 8): 10 · mean over the references of exp(-(l_c - l_s)² / 2σ²) ·
    min(g_c, g_s) · g_s / (|g_c| |g_s|). g are counts of n-grams times their inverse document frequency; a document is
    the references of one example, so figures of different data do not compare, and a single example scores 0. Words
    are not stemmed, as in the scripts; the paper stems them.
    """
    documents = Counter(
        ngram for theirs in references for ngram in {each for words in theirs for each in _all_ngrams(words)}
    )
    idf = {ngram: math.log(len(references) / count) for ngram, count in documents.items()}
    unseen = math.log(len(references)) if references else 0.0
    return [
        math.fsum(_agreement(text, reference, idf, unseen) for reference in theirs) / len(theirs)
        for text, theirs in zip(texts, references, strict=True)
    ]


def _all_ngrams(words: Words) -> list[tuple[str, ...]]:
    return [ngram for n in range(1, _LONGEST + 1) for ngram in ngrams(words, n)]


def _agreement(text: Words, reference: Words, idf: Mapping[tuple[str, ...], float], unseen: float) -> float:
    """CIDEr-D against one reference, averaged over the sizes of n-grams."""
    penalty = math.exp(-((len(text) - len(reference)) ** 2) / (2 * _SIGMA**2))
    cosines = 0.0
    for n in range(1, _LONGEST + 1):
        own, other = (
            {ngram: count * idf.get(ngram, unseen) for ngram, count in Counter(ngrams(words, n)).items()}
            for words in (text, reference)
        )
        if lengths := _norm(own) * _norm(other):
            cosines += sum(min(weight, other[at]) * other[at] for at, weight in own.items() if at in other) / lengths
    return 10 * penalty * cosines / _LONGEST


def _norm(vector: Vector) -> float:
    return math.hypot(*vector.values())
