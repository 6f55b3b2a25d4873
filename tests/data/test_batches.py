"""Batches: every example once, within the budget, with little padding, in an order that the seed decides."""

import numpy as np
import pytest
import torch

from deltatune import Split
from deltatune.data.batches import by_length, collate, epoch, padded_length
from deltatune.data.tokens import length_limit, tokenize
from tiny import ARCHITECTURES, tiny_model, tokenizer

LENGTHS = np.random.default_rng(0).geometric(1 / 25, 5000).clip(3, 120).tolist()


def padded(batches: list[list[int]]) -> list[int]:
    """Tokens of each batch, padding included."""
    return [len(batch) * padded_length(max(LENGTHS[place] for place in batch), max(LENGTHS)) for batch in batches]


def test_an_epoch_has_every_example_once_and_no_batch_over_the_budget() -> None:
    batches = epoch(LENGTHS, 1024, np.random.default_rng(1))
    assert sorted(place for batch in batches for place in batch) == list(range(len(LENGTHS)))
    assert all(size <= 1024 for size in padded(batches))


def test_little_of_an_epoch_is_padding() -> None:
    batches = epoch(LENGTHS, 1024, np.random.default_rng(1))
    assert sum(padded(batches)) <= 1.18 * sum(LENGTHS)  # 3.5 tokens of 25 fill up eights


def test_few_shapes_occur_and_no_row_is_longer_than_the_longest_example() -> None:
    batches = epoch(LENGTHS, 1024, np.random.default_rng(1))
    assert {padded_length(max(LENGTHS[place] for place in batch), 117) for batch in batches} <= {*range(8, 117, 8), 117}
    assert [padded_length(length, 9) for length in (1, 8, 9)] == [8, 8, 9]


def test_the_seed_decides_the_order_and_epochs_differ() -> None:
    generator = np.random.default_rng(1)
    first, second = epoch(LENGTHS, 1024, generator), epoch(LENGTHS, 1024, generator)
    assert first == epoch(LENGTHS, 1024, np.random.default_rng(1))
    assert first != second


def test_batches_of_long_and_short_examples_come_mixed() -> None:
    means = [np.mean([LENGTHS[place] for place in batch]) for batch in epoch(LENGTHS, 1024, np.random.default_rng(1))]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


def test_an_example_longer_than_the_budget_stands_alone() -> None:
    assert sorted(map(len, epoch([5, 2000, 5], 64, np.random.default_rng(0)))) == [1, 2]


def test_texts_pairs_and_korean_become_tokens_with_their_ends_cut_off() -> None:
    words = tokenizer("bert")
    tokens = tokenize(Split(["영화 정말 좋다", "good"], [1, 0]), words, 8)
    assert words.decode(tokens.fields[0]["input_ids"], skip_special_tokens=True) == "영화 정말 좋다"
    pairs = tokenize(Split(["good film", "bad"], [1, 0], pairs=["great story", "dull plot"]), words, 16)
    assert words.decode(pairs.fields[0]["input_ids"], skip_special_tokens=True) == "good film great story"
    cut = tokenize(Split(["good " * 30, "good " * 6], [0, 1]), words, 8)
    assert cut.lengths == [8, 8]
    assert cut.truncated == 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_changes_no_output(architecture: str) -> None:
    model = tiny_model(architecture)
    texts = Split(["good", "the film is very very good", "bad story"], [0, 1, 0])
    words = tokenizer(architecture)
    tokens = tokenize(texts, words, length_limit(words, model.config, 256))
    together = collate(tokens, [0, 1, 2], pad=0)
    with torch.no_grad():
        alone = [model(**collate(tokens, [place], pad=0).inputs).logits[0] for place in range(3)]
        torch.testing.assert_close(model(**together.inputs).logits, torch.stack(alone), atol=1e-5, rtol=1e-5)


def test_scoring_takes_every_example_once() -> None:
    lengths = [n % 7 + 1 for n in range(50)]
    batches = by_length(lengths, 64)
    assert sorted(place for batch in batches for place in batch) == list(range(50))
    assert all(len(batch) * max(lengths[place] for place in batch) <= 64 for batch in batches)
    assert len(batches) <= 6
