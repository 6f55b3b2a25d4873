"""Texts as the words that the measures count: two tokenizers of the scripts that defined them."""

import re

Words = list[str]

_DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
"""The marks that the scripts of COCO captions leave out."""


def caption_words(text: str) -> Words:
    """Words as the scripts of COCO captions see them: Penn Treebank tokens in lower case, without punctuation.

    The scripts run Stanford's tokenizer, in Java; this is NLTK's of the same conventions, over each piece that ends in
    a stop and a space, with currency signs as words of their own. They differ where a stop belongs to the word: `Mr.
    Smith` loses it here.
    """
    from nltk.tokenize import NLTKWordTokenizer

    tokenizer = NLTKWordTokenizer()
    pieces = re.split(r"(?<=[.?!])\s+", re.sub("([£€¥])", r" \1 ", text))
    tokens = [token for piece in pieces for token in tokenizer.tokenize(piece)]
    return [token.lower() for token in tokens if token not in _DROPPED]


def mteval_words(text: str) -> Words:
    """Words as NIST's script `mteval-v13a` sees them, in lower case: sacreBLEU's tokenizer 13a."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return str(Tokenizer13a()(text)).lower().split()


def ngrams(words: Words, n: int) -> list[tuple[str, ...]]:
    """The runs of `n` words, in order; none where there are fewer words."""
    return list(zip(*(words[start:] for start in range(n)), strict=False))
