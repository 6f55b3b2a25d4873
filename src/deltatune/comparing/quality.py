"""What the figures on a split are called, and what they mean."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Quality:
    """One figure on the test split."""

    title: str
    meaning: str
    share: bool = True
    """Whether it is in [0, 1] and shown in percent."""

    @property
    def word(self) -> str:
        """Its title within a sentence: "accuracy", "ROUGE-L"."""
        return self.title if any(letter.isupper() for letter in self.title[1:]) else self.title.lower()


QUALITIES = {
    "accuracy": Quality("Accuracy", "Share of the test split that was right."),
    "macro_f1": Quality(
        "Macro-F1",
        "F1 of each class on the test split, averaged with equal weight: small classes count as much.",
        False,
    ),
    "calibration_error": Quality(
        "ECE",
        "Expected calibration error on the test split: by how much the probability of the answers misses how often "
        "they are right, mean over 15 bins of probability (arXiv 1706.04599). Smaller is better.",
    ),
    "rougeL": Quality("ROUGE-L", "F-measure of the longest common subsequence with the reference, mean over examples."),
    "rouge1": Quality("ROUGE-1", "F-measure of the words shared with the reference, mean over examples."),
    "rouge2": Quality("ROUGE-2", "F-measure of the pairs of words shared with the reference, mean over examples."),
    "bleu": Quality("BLEU", "Precision of runs of one to four words over the whole split, with a brevity penalty."),
    "bleu_uncased": Quality("BLEU, uncased", "As BLEU, without regard to case: what papers on E2E report."),
    "chrf": Quality("chrF", "F-score of runs of one to six characters over the whole split."),
    "nist": Quality("NIST", "As BLEU, with rare runs of words weighing more; in bits, from 0 up.", False),
    "meteor": Quality("METEOR", "Harmonic mean of precision and recall of aligned words, less where order differs."),
    "cider": Quality(
        "CIDEr", "Similarity of runs of words, weighed by how rare they are in the references; from 0 to 10.", False
    ),
    "exact_match": Quality("Exact", "Share of the answers that are the reference, word for word."),
    "perplexity": Quality("Perplexity", "Of the scored tokens of the test split: the exponential of the loss.", False),
    "loss": Quality("Test loss", "Mean cross-entropy on the test split, in nats.", False),
}
"""By the name in `CellResult.test`, in the order of tables."""


def named(figure: str) -> Quality:
    """How a figure is shown; one that is not known goes by its name."""
    return QUALITIES.get(figure) or Quality(figure.replace("_", " ").capitalize(), "", False)
