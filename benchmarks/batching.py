"""What batches of texts cost: padded at random, padded after grouping by length, and these packed into one row.

python benchmarks/batching.py [--base smollm2] [--data docstrings] [--layers 6] [--rounds 15] [--tokens 1024]

Forward and backward of LoRA on the same number of tokens, in the machine's precision, all variants interleaved in one
process. Printed are medians, the medians of the ratios within a round, and by how much the packed loss differs from
the padded one in fp32 on the same texts.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import numpy as np
import torch

import deltatune
from deltatune.data.batches import epoch
from deltatune.models import short_attention
from deltatune.training.language import LanguageModelling
from deltatune.training.precision import Computed, prepare, resolve


def tasks(base: deltatune.Base, precision: Computed) -> tuple[LanguageModelling, LanguageModelling]:
    """The task with padding, and as it is."""
    return LanguageModelling(base, precision, packs=False), LanguageModelling(base, precision)


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
    base.model.set_attn_implementation(short_attention.NAME)
    deltatune.attach(base.model, deltatune.LoRA())
    sequences = LanguageModelling(base, "fp32").encode(deltatune.load_data(chosen.data).train, 256)
    lengths = sequences.lengths

    def run(task: LanguageModelling, places: Sequence[int]) -> tuple[float, float]:
        batch = task.collate(sequences, places)
        began = time.perf_counter()
        loss = task.backward(batch, batch.units)
        took = time.perf_counter() - began
        base.model.zero_grad()
        return took, loss

    grouped = epoch(lengths, chosen.tokens, np.random.default_rng(0))
    size = max(1, chosen.tokens * len(lengths) // sum(lengths))
    order = np.random.default_rng(0).permutation(len(lengths)).tolist()
    mixed = [order[start : start + size] for start in range(0, len(order), size)]
    padded, packed = tasks(base, "fp32")
    apart = max(abs(run(packed, places)[1] - run(padded, places)[1]) for places in grouped[:3])

    padded, packed = tasks(base, resolve("auto"))
    prepare(base.model, resolve("auto"))
    base.model.train()
    kinds = {"padded at random": padded, "grouped": padded, "packed at random": packed, "packed": packed}
    took: dict[str, list[float]] = {kind: [] for kind in kinds}
    for places, others in zip(grouped[: chosen.rounds + 2], mixed, strict=False):
        for kind, task in kinds.items():
            of = others if kind.endswith("random") else places
            took[kind].append(run(task, of)[0] / sum(lengths[place] for place in of))
    print(f"{torch.get_num_threads()} threads, {resolve('auto')}, {chosen.layers} layers, {chosen.rounds} rounds")
    for kind, times in took.items():
        ratio = statistics.median(a / b for a, b in zip(times[2:], took["grouped"][2:], strict=True))
        print(f"{kind}: {1e6 * statistics.median(times[2:]):.0f} µs a token, {ratio:.2f} of grouped")
    print(f"packed and padded loss in fp32: {apart:.1e} apart")


if __name__ == "__main__":
    main()
