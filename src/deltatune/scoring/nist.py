"""NIST: matched n-grams, weighted by how much each tells.

George Doddington, *Automatic Evaluation of Machine Translation Quality Using N-gram Co-Occurrence Statistics*, HLT
2002; as NIST's script `mteval-v13a` computes it.
"""

import math
from collections import Counter
from collections.abc import Sequence

from deltatune.scoring.tokens import Words, ngrams

_BETA = math.log(0.5) / math.log(1.5) ** 2
"""Makes a text two thirds as long as its references count half (section 4)."""


def nist(texts: Sequence[Words], references: Sequence[Sequence[Words]], longest: int = 5) -> float:
    """The NIST score of a corpus, in bits (equation 3): 0 where nothing matches, and without an upper bound.

    Σ over n of (information of the texts' n-grams that also stand in a reference of theirs) / (number of the texts'
    n-grams), times a penalty of texts that are shorter than their references on average. An n-gram matches as often as
    it stands in the reference that has it most often. Sizes for which all texts are too short add nothing.
    """
    information = _information(references, longest)
    total = 0.0
    for n in range(1, longest + 1):
        bits, count = 0.0, 0
        for text, theirs in zip(texts, references, strict=True):
            own = Counter(ngrams(text, n))
            most: Counter[tuple[str, ...]] = Counter()
            for reference in theirs:
                most |= Counter(ngrams(reference, n))
            bits += sum(information[ngram] * times for ngram, times in (own & most).items())
            count += own.total()
        total += bits / count if count else 0.0
    return total * _penalty(
        sum(map(len, texts)), math.fsum(sum(map(len, theirs)) / len(theirs) for theirs in references)
    )


def _information(references: Sequence[Sequence[Words]], longest: int) -> dict[tuple[str, ...], float]:
    """Bits that the last word of an n-gram tells after the words before it, in all references (equation 2)."""
    counts: Counter[tuple[str, ...]] = Counter()
    for theirs in references:
        for reference in theirs:
            counts[()] += len(reference)
            for n in range(1, longest + 1):
                counts.update(ngrams(reference, n))
    return {ngram: math.log2(counts[ngram[:-1]] / count) for ngram, count in counts.items() if ngram}


def _penalty(length: int, reference: float) -> float:
    """What short texts keep; `reference` is the sum over the texts of their references' mean lengths."""
    if not length or not reference:
        return 0.0
    return math.exp(_BETA * math.log(min(1.0, length / reference)) ** 2)
