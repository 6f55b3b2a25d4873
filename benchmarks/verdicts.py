"""How often a comparison calls methods different that are not, and how often it finds a difference that is there.

OMP_NUM_THREADS=1 python benchmarks/verdicts.py [--simulations 1000] [--examples 1500] [--methods 2]

Test examples, seeds and answers are made up: what is hard for one method is hard for the others, each method has
examples that suit it, each seed its luck on single examples, and each seed of each method shifts its accuracy (`luck`,
the standard deviation of that shift in points). Without a difference every method is equally good, so that a comparison
which calls any pair different gives a false alarm. With one, the first method is better by twice the half-width that
decides in such comparisons (the mean over simulations without any), and should be called better than the second.

`resampling` is how often percentiles of resampled examples and seeds, one seed fewer drawn, leave out 0 for one pair.
"""

import argparse
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from scipy.stats import norm

from deltatune.comparing.chance import Values, chance, moderated
from deltatune.comparing.results import CellResult
from deltatune.comparing.statistics import LEVEL, between, pairs

TEMPLATE = CellResult(
    label="", method="lora", options={}, seed=0, metric="accuracy", test={"accuracy": 0.0}, test_values=[],
    test_digest="", validation={}, train_loss=0.0, truncated=0, steps=1, train_seconds=1.0, examples_per_second=1.0,
    tokens_per_second=1.0, peak_bytes=1, baseline_bytes=1, trainable=1, total=1, adapter_bytes=1, model_bytes=1,
    precision="fp32",
)  # fmt: skip
THRESHOLD = norm.ppf(0.8)
"""Standard deviations of a score below which an answer is right: 80% are."""
SPREAD = (1 + 0.5**2 + 0.6**2) ** 0.5
"""Standard deviation of a score: of the example, of how it suits the method, of the seed's luck on it."""


WORLDS = [
    (2, 1, 0.0), (2, 2, 0.0), (2, 2, 0.01), (2, 3, 0.0), (2, 3, 0.005), (2, 3, 0.01), (2, 3, 0.03), (2, 5, 0.01),
    (5, 1, 0.0), (5, 3, 0.0), (5, 3, 0.01), (10, 3, 0.01), (10, 3, 0.01, 2),
]  # fmt: skip
"""Methods, seeds, the luck of a seed, and how many methods have five times as much of it."""


@dataclass(frozen=True)
class World:
    """From what answers are drawn."""

    methods: int
    seeds: int
    examples: int
    luck: float
    """Standard deviation of the accuracy of one seed, as a share."""
    noisy: int = 0
    """The last so many methods have five times that."""

    def draw(self, generator: np.random.Generator, advantage: float = 0.0) -> list[CellResult]:
        """Cells of one comparison; the first method is better by `advantage` (a share), the others are alike."""
        hard = generator.normal(size=(self.examples, 1))
        cells = []
        for method in range(self.methods):
            suits = 0.5 * generator.normal(size=(self.examples, 1))
            single = 0.6 * generator.normal(size=(self.examples, self.seeds))
            luck = self.luck * (5 if method >= self.methods - self.noisy else 1)
            gain = advantage * (method == 0) + luck * generator.normal(size=self.seeds)
            right = (hard + suits + single) / SPREAD < THRESHOLD + gain / norm.pdf(THRESHOLD)
            cells += [
                TEMPLATE.model_copy(
                    update={"label": str(method), "seed": seed, "test_values": right[:, seed].astype(float).tolist()}
                )
                for seed in range(self.seeds)
            ]
        return cells


def simulate(world: World, simulations: int, seed: int = 0) -> dict[str, float]:
    """Shares of simulated comparisons that call any pair different without a difference, and find one that is there."""
    generator = np.random.default_rng(seed)
    alarms, halves, resampled = [], [], []
    for _ in range(simulations):
        cells = world.draw(generator)
        found = pairs(cells)
        alarms.append(any(pair.difference.verdict != "not distinguishable" for pair in found))
        gains = [gains_of(cells, pair.a, pair.b) for pair in found]
        halves.append(moderated([chance(one) for one in gains], world.methods)[0].half_width(LEVEL / len(found)))
        resampled.append(not percentile_interval_holds_0(gains[0], generator))
    advantage = 2 * fmean(halves)
    hits = []
    for _ in range(simulations):
        gap = between(pairs(world.draw(generator, advantage)), "0", "1")
        hits.append(gap is not None and gap.verdict == "better")
    return {"false": fmean(alarms), "half": fmean(halves), "found": fmean(hits), "resampling": fmean(resampled)}


def gains_of(cells: list[CellResult], a: str, b: str) -> Values:
    """By how much one method did better than another, (examples, seeds)."""
    first, second = ([cell.test_values for cell in cells if cell.label == label] for label in (a, b))
    return np.subtract(first, second).T


def percentile_interval_holds_0(gains: Values, generator: np.random.Generator, resamples: int = 500) -> bool:
    """Whether the percentile interval of resampled examples and seeds holds 0."""
    patterns, counts = np.unique(gains, axis=0, return_counts=True)
    draws = generator.multinomial(counts.sum(), counts / counts.sum(), size=resamples)
    seeds = gains.shape[1]
    weights = generator.multinomial(max(1, seeds - 1), np.full(seeds, 1 / seeds), size=resamples)
    low, high = np.quantile((draws @ patterns * weights).sum(axis=1), [0.025, 0.975])
    return bool(low <= 0 <= high)


def main() -> None:
    """Prints a line for each world."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--examples", type=int, default=1500)
    parser.add_argument("--methods", type=int, default=2, help="leave out the worlds with fewer")
    arguments = parser.parse_args()
    print("| Methods | Seeds | Luck of a seed | Called different | Half-width | Found at twice that | Resampling |")
    print("|---|---|---|---|---|---|---|")
    for methods, seeds, luck, *noisy in WORLDS:
        if methods < arguments.methods:
            continue
        found = simulate(World(methods, seeds, arguments.examples, luck, *noisy), arguments.simulations)
        some = f", {noisy[0]} five times" if noisy else ""
        print(
            f"| {methods} | {seeds} | {100 * luck:g}{some} | {found['false']:.1%} "
            f"| {100 * found['half']:.2f} | {found['found']:.1%} | {found['resampling']:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
