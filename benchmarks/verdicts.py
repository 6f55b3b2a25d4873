"""How often a comparison calls methods different that are not, and how often it finds a difference that is there.

OMP_NUM_THREADS=1 python benchmarks/verdicts.py [--simulations 1000] [--methods 2]

Test examples, seeds and answers are made up: what is hard for one method is hard for the others, each method has
examples that suit it, each seed its luck on single examples, and each seed of each method shifts its quality (`luck`,
the standard deviation of that shift in points). Answers are right or wrong, 80% of them right, or scored by degrees.
Without a difference every method is equally good, so that a comparison which calls any pair different gives a false
alarm. With one, the first method is better by twice the half-width that decides in such comparisons (the mean over
simulations without any), and should be called better than the second; where no method could be so much better that is
left out.
"""

import argparse
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from scipy.stats import norm

from deltatune.comparing.chance import Values, chance, moderated
from deltatune.comparing.results import CellResult
from deltatune.comparing.statistics import LEVEL, between, pairs, with_imagined

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

SLOPE = norm.pdf(0) / 2**0.5
"""By how much the mean of scores by degrees rises with what their normal variables are shifted by."""
SIMULATIONS_OF_HALF_WIDTHS = 200
"""They vary little, and finding them takes longer than a verdict."""


@dataclass(frozen=True)
class World:
    """From what answers are drawn."""

    methods: int
    seeds: int
    examples: int
    luck: float
    """Standard deviation of the quality of one seed, as a share."""
    noisy: int = 0
    """The last so many methods have five times that."""
    graded: bool = False
    """Whether answers are scored by degrees."""

    def draw(self, generator: np.random.Generator, advantage: float = 0.0) -> list[CellResult]:
        """Cells of one comparison; the first method is better by `advantage` (a share), the others are alike."""
        hard = generator.normal(size=(self.examples, 1))
        cells = []
        for method in range(self.methods):
            suits = 0.5 * generator.normal(size=(self.examples, 1))
            single = 0.6 * generator.normal(size=(self.examples, self.seeds))
            luck = self.luck * (5 if method >= self.methods - self.noisy else 1)
            gain = advantage * (method == 0) + luck * generator.normal(size=self.seeds)
            score = (hard + suits + single) / SPREAD
            values = norm.cdf(gain / SLOPE - score) if self.graded else score < THRESHOLD + gain / norm.pdf(THRESHOLD)
            cells += [
                TEMPLATE.model_copy(
                    update={"label": str(method), "seed": seed, "test_values": values[:, seed].astype(float)}
                )
                for seed in range(self.seeds)
            ]
        return cells

    @property
    def room(self) -> float:
        """By how much a method could be better."""
        return 0.3 if self.graded else 0.2


WORLDS = [
    *(
        World(methods, seeds, examples, 0.01 if seeds > 1 else 0.0, graded=graded)
        for methods in (2, 5)
        for seeds in (1, 2, 3, 5)
        for graded in (False, True)
        for examples in (100, 1500)
    ),
    World(2, 2, 1500, 0.0), World(2, 3, 1500, 0.0), World(2, 3, 1500, 0.03), World(2, 1, 20, 0.0, graded=True),
    World(5, 3, 1500, 0.0), World(5, 3, 1500, 0.03), World(5, 3, 500, 0.01, noisy=1), World(5, 3, 500, 0.01, noisy=2),
    World(10, 3, 500, 0.01), World(10, 3, 500, 0.01, noisy=2),
]  # fmt: skip


def simulate(world: World, simulations: int, seed: int = 0) -> dict[str, float]:
    """Shares of simulated comparisons that call any pair different without a difference, and find one that is there."""
    generator = np.random.default_rng(seed)
    alarms, halves = [], []
    for number in range(simulations):
        cells = world.draw(generator)
        found = pairs(cells)
        alarms.append(any(pair.difference.verdict != "not distinguishable" for pair in found))
        if number < SIMULATIONS_OF_HALF_WIDTHS:
            gains = [with_imagined(gains_of(cells, pair.a, pair.b)) for pair in found]
            halves.append(moderated([chance(one) for one in gains], world.methods)[0].half_width(LEVEL / len(found)))
    advantage = 2 * fmean(halves)
    hits = []
    for _ in range(simulations if advantage < world.room else 0):
        gap = between(pairs(world.draw(generator, advantage)), "0", "1")
        hits.append(gap is not None and gap.verdict == "better")
    power = {"found": fmean(hits)} if hits else {}
    return {"false": fmean(alarms), "half": fmean(halves), **power}


def gains_of(cells: list[CellResult], a: str, b: str) -> Values:
    """By how much one method did better than another, (examples, seeds)."""
    first, second = ([cell.test_values for cell in cells if cell.label == label] for label in (a, b))
    return np.subtract(first, second).T


def main() -> None:
    """Prints a line for each world."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--methods", type=int, nargs="*", help="only worlds with so many")
    arguments = parser.parse_args()
    print("| Methods | Seeds | Luck | Scores | Examples | Called different | Half-width | Found at twice that |")
    print("|---|---|---|---|---|---|---|---|")
    for world in WORLDS:
        if arguments.methods and world.methods not in arguments.methods:
            continue
        found = simulate(world, arguments.simulations)
        some = f", {world.noisy} five times" if world.noisy else ""
        scores = "by degrees" if world.graded else "right or wrong"
        print(
            f"| {world.methods} | {world.seeds} | {100 * world.luck:g}{some} | {scores} | {world.examples} "
            f"| {found['false']:.1%} | {100 * found['half']:.2f} "
            f"| {format(found['found'], '.1%') if 'found' in found else '–'} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
