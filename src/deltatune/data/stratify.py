"""Drawing rows by lot so that each label keeps its share: the same rows on every machine and with every library."""

import hashlib
from collections import Counter
from collections.abc import Sequence


def spread(labels: Sequence[int], seed: int) -> list[int]:
    """All rows in a drawn order of which every beginning holds the labels in proportion.

    The first row of every label comes before all others, so that every beginning that is long enough has all labels.
    """
    counts = Counter(labels)
    met: Counter[int] = Counter()
    place = {}
    # A hash draws the lots: random number generators promise less about other versions of themselves.
    drawn = sorted(range(len(labels)), key=lambda row: hashlib.sha256(f"{seed}:{row}".encode()).digest())
    for row in drawn:
        label = labels[row]
        place[row] = (met[label] > 0, (met[label] + 0.5) / counts[label])
        met[label] += 1
    return sorted(drawn, key=lambda row: place[row])
