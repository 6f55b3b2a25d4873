"""What batches of texts cost: padded at random, padded after grouping by length, and packed into one row.

python benchmarks/batching.py [--base smollm2] [--data docstrings] [--layers 6] [--rounds 15] [--tokens 1024]

Forward and backward of LoRA on the same number of tokens, in the machine's precision, all variants interleaved in one
process. A packed row begins its positions anew with each text; a token sees those before it in its own text alone:
`packed, masked` lets Transformers mask the others, `packed, apart` computes the attention of each length by itself and
computes nothing that is masked. Printed are medians, the medians of the ratios within a round, and by how much the
packed loss differs from the grouped one in fp32 on the same texts.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

import deltatune
from deltatune.data.batches import Batch, epoch
from deltatune.data.sequences import UNSCORED, Sequences
from deltatune.models import short_attention as short
from deltatune.training.language import LanguageModelling
from deltatune.training.precision import prepare, resolve


def packed(sequences: Sequences, places: Sequence[int]) -> Batch:
    """The texts in one row, shortest first."""
    places = sorted(places, key=lambda place: len(sequences.inputs[place]))
    inputs = [torch.tensor(sequences.inputs[place]) for place in places]
    targets = [torch.tensor([UNSCORED, *sequences.targets[place][1:]]) for place in places]
    positions = torch.cat([torch.arange(len(ids)) for ids in inputs])
    labels = torch.cat(targets)[None]
    # With a cache, which is on by default, Transformers would not see where one text ends and another begins.
    row = {"input_ids": torch.cat(inputs)[None], "position_ids": positions[None], "use_cache": torch.tensor(False)}
    return Batch(row, labels, tuple(places), len(positions), int((labels != UNSCORED).sum()))


class Apart:
    """Attention of a packed row: that of each length as a batch of its own."""

    lengths: tuple[tuple[int, int], ...] = ()
    """How many texts of which length stand in the row, in their order."""

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _: Any, scaling: float, **__: Any
    ) -> tuple[Tensor, None]:
        """Queries, keys and values (1, heads, tokens, width) → (1, tokens, heads, width)."""
        outputs, start = [], 0
        for count, length in self.lengths:
            stop = start + count * length
            q, k, v = (x[0, :, start:stop].unflatten(1, (count, length)).transpose(0, 1) for x in (query, key, value))
            outputs.append(self._of(q, k, v, scaling).transpose(1, 2).flatten(0, 1))
            start = stop
        return torch.cat(outputs)[None], None

    def _of(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        texts, heads, length, width = q.shape
        groups = k.shape[1]
        scores = q.reshape(texts, groups, -1, width) @ k.transpose(-1, -2) * scaling
        later = torch.full((length, length), -torch.inf, dtype=scores.dtype).triu(1)
        scores = scores.view(texts, groups, -1, length, length) + later
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype).view(texts, groups, -1, length)
        return (weights @ v).view(texts, heads, length, width)


def main() -> None:
    """Measures and prints."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--base", default="smollm2")
    options.add_argument("--data", default="docstrings")
    options.add_argument("--layers", type=int, default=6)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--tokens", type=int, default=1024)
    chosen = options.parse_args()

    base = deltatune.load(chosen.base)
    del base.model.get_decoder().layers[chosen.layers :]
    task = LanguageModelling(base, "fp32")
    sequences = task.encode(deltatune.load_data(chosen.data).train, 256)
    lengths = sequences.lengths
    apart = Apart()
    AttentionInterface.register("apart", apart)

    def run(kind: str, places: Sequence[int]) -> tuple[float, float]:
        base.model.set_attn_implementation({"packed, apart": "apart", "packed, masked": "eager"}.get(kind, short.NAME))
        batch = packed(sequences, places) if kind.startswith("packed") else task.collate(sequences, places)
        ordered = [lengths[place] for place in batch.indices]
        apart.lengths = tuple((ordered.count(length), length) for length in sorted(set(ordered)))
        began = time.perf_counter()
        loss = task.backward(batch, batch.units)
        took = time.perf_counter() - began
        base.model.zero_grad()
        return took, loss

    deltatune.attach(base.model, deltatune.LoRA())
    grouped = epoch(lengths, chosen.tokens, np.random.default_rng(0))
    size = max(1, chosen.tokens * len(lengths) // sum(lengths))
    order = np.random.default_rng(0).permutation(len(lengths)).tolist()
    mixed = [order[start : start + size] for start in range(0, len(order), size)]
    kinds = ("grouped", "packed, masked", "packed, apart")
    apart_by = {
        kind: max(abs(run(kind, places)[1] - run("grouped", places)[1]) for places in grouped[:3]) for kind in kinds
    }

    task = LanguageModelling(base, resolve("auto"))
    prepare(base.model, resolve("auto"))
    base.model.train()
    took: dict[str, list[float]] = {kind: [] for kind in ("padded at random", *kinds)}
    for places, others in zip(grouped[: chosen.rounds + 2], mixed, strict=False):
        for kind in took:
            of = others if kind == "padded at random" else places
            seconds, _ = run(kind, of)
            took[kind].append(seconds / sum(lengths[place] for place in of))
    print(f"{torch.get_num_threads()} threads, {resolve('auto')}, {chosen.layers} layers, {chosen.rounds} rounds")
    for kind, times in took.items():
        ratio = statistics.median(a / b for a, b in zip(times[2:], took["grouped"][2:], strict=True))
        note = f", loss apart by {apart_by[kind]:.1e} in fp32" if kind.startswith("packed") else ""
        print(f"{kind}: {1e6 * statistics.median(times[2:]):.0f} µs a token, {ratio:.2f} of grouped{note}")


if __name__ == "__main__":
    main()
