"""All measures of generated texts at once: figures of the corpus, and of each example where the measure has them."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import fsum

from deltatune.errors import UserError
from deltatune.scoring.cider import cider
from deltatune.scoring.meteor import meteor
from deltatune.scoring.nist import nist
from deltatune.scoring.tokens import caption_words, mteval_words

Corpus = Sequence[Sequence[str]]


@dataclass(frozen=True)
class TextScores:
    """How generated texts compare with their references."""

    figures: dict[str, float]
    """By name, of all texts together. exact_match, rouge1, rouge2, rougeL, bleu, bleu_uncased, chrf and meteor go from
    0 to 1, cider goes from 0 to 10, and nist is in bits, without an upper bound."""
    examples: dict[str, list[float]]
    """By name, of each text in order, in the same units; BLEU and NIST are measures of a corpus and have none."""
    variants: dict[str, str]
    """By name, what exactly was computed: sacreBLEU's signatures, and the like for the others."""


def score_texts(predictions: Sequence[str], references: Corpus) -> TextScores:
    """Holds each prediction against its references, one or several, by every measure.

    `nist` and `bleu_uncased` are what NIST's `mteval-v13a` gives, and so what papers on the E2E data report. `cider` is
    theirs, too, but for the tokenizer; `meteor` and `rougeL` are not: that METEOR is version 1.5, and their ROUGE-L
    weighs recall more. An empty prediction is a wrong one: it scores 0, unless a reference is empty, too, which is an
    exact match. ROUGE sees only the letters a to z and digits: it says nothing about other scripts; chrF does.
    Raises `UserError` where there is nothing to score, or a prediction without references.
    """
    _check(predictions, references)
    exact = [
        float(" ".join(text.split()) in {" ".join(reference.split()) for reference in theirs})
        for text, theirs in zip(predictions, references, strict=True)
    ]
    words = list(map(caption_words, predictions))
    their_words = [list(map(caption_words, theirs)) for theirs in references]
    chrf, each_chrf, chrf_signature = _chrf(predictions, references)
    bleu, bleu_signature = _bleu(predictions, references, lowercase=False)
    uncased, uncased_signature = _bleu(predictions, references, lowercase=True)
    examples = {
        "exact_match": exact,
        **_rouge(predictions, references),
        "chrf": each_chrf,
        "meteor": meteor(words, their_words),
        "cider": cider(words, their_words),
    }
    bits = nist(list(map(mteval_words, predictions)), [list(map(mteval_words, theirs)) for theirs in references])
    means = {name: fsum(values) / len(values) for name, values in examples.items()}
    rouge = f"F1, Porter stemmer, best of the references, rouge-score {version('rouge-score')}"
    variants = {
        "exact_match": "any reference, white space aside",
        **dict.fromkeys(("rouge1", "rouge2", "rougeL"), rouge),
        "bleu": bleu_signature,
        "bleu_uncased": uncased_signature,
        "chrf": chrf_signature,
        "nist": "n-grams up to 5, tok:13a, case:lc",
        "meteor": f"2005, exact and stem matches, Treebank tokens, case:lc, NLTK {version('nltk')}",
        "cider": "CIDEr-D, sigma 6, Treebank tokens, case:lc, frequencies of these references",
    }
    figures = means | {"chrf": chrf, "bleu": bleu, "bleu_uncased": uncased, "nist": bits}
    return TextScores({name: figures[name] for name in variants}, examples, variants)


def _check(predictions: Sequence[str], references: Corpus) -> None:
    if len(predictions) != len(references):
        raise UserError(
            f"there are {len(predictions)} texts to score and references for {len(references)}",
            "give each text its own list of references",
        )
    if not predictions:
        raise UserError("there are no texts to score", "is the split empty?")
    for place, theirs in enumerate(references, 1):
        if isinstance(theirs, str):
            raise UserError(f"the references of text {place} are one text", "give a list, even of a single reference")
        if not theirs:
            raise UserError(f"text {place} has no reference", "leave out what cannot be scored")


def _rouge(predictions: Sequence[str], references: Corpus) -> dict[str, list[float]]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004) of each text, by Google's package, with the Porter stemmer."""
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names, tokenizer=DefaultTokenizer(use_stemmer=True))
    scores = [scorer.score_multi(theirs, text) for text, theirs in zip(predictions, references, strict=True)]
    return {name: [float(score[name].fmeasure) for score in scores] for name in names}


def _bleu(predictions: Sequence[str], references: Corpus, *, lowercase: bool) -> tuple[float, str]:
    """Corpus BLEU (Papineni et al. 2002) by sacreBLEU with its defaults but for the case, and its signature."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(lowercase=lowercase, force=True)  # no advice about texts that look tokenized
    score = metric.corpus_score(predictions, _columns(references)).score / 100
    return score, str(metric.get_signature())


def _chrf(predictions: Sequence[str], references: Corpus) -> tuple[float, list[float], str]:
    """chrF2 (Popović 2015) by sacreBLEU with its defaults: of the corpus, of each text, and the signature."""
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF()
    each = [
        metric.sentence_score(text, theirs).score / 100 for text, theirs in zip(predictions, references, strict=True)
    ]
    score = metric.corpus_score(predictions, _columns(references)).score / 100
    return score, each, str(metric.get_signature())


def _columns(references: Corpus) -> list[list[str | None]]:
    """As sacreBLEU takes them: all first references, all second ones …; None where a text has fewer."""
    most = max(map(len, references))
    return [[theirs[place] if place < len(theirs) else None for theirs in references] for place in range(most)]
