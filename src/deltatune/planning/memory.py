"""The memory of a run, term by term, and its peak.

A run is fullest while it loads (the weights as they are read, beside the file they are read from), while it trains, or
while it scores a validation. On a CPU it is a process' resident memory; on a GPU the device's.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from deltatune.planning.machine import Machine
from deltatune.planning.rehearsal import Rehearsed
from deltatune.planning.work import OWN_PRODUCT, PRODUCTS, Traced
from deltatune.training.settings import Training

_SMALL = 4096
"""Tensors below so many numbers keep fp32 moments in 8-bit AdamW (arXiv 2110.02861)."""
STATES = {"adamw": 8.0, "adamw8bit": 2 * (1 + 4 / 256), "paged": 0.0}
"""Bytes of AdamW's two moments for each trained number; paged ones are the system's to take away."""


_MOST_KERNELS = 1024
"""So many oneDNN keeps."""


@dataclass(frozen=True)
class Memory:
    """Bytes of each term. What is alive at once is added up in `training`, `scoring` and `loading`."""

    process: float
    """What a process that trains holds whatever it trains: libraries, kernels; or a GPU's context."""
    weights: float
    """What is frozen, in its storage, buffers included."""
    trained: float
    """What trains, in fp32."""
    gradients: float
    states: float
    """The optimiser's."""
    best: float
    """The copy of the best weights so far."""
    activations: float
    """What the forward pass keeps for the backward pass."""
    temporaries: float
    """What lives beyond that at the fullest moment of a step: gradients that stand already, logits, and what
    operations need in passing."""
    scored: float
    """The most that lives while a batch is scored."""
    slack: float
    """What the allocator holds beyond what lives, at the fullest moment."""
    kernels: float
    """Made for products of further shapes than the largest batch has, and kept."""
    read: float
    """What loading holds: the process till then, the weights as they are read, and the pages of their file."""

    @property
    def loading(self) -> float:
        """The most while the base is read."""
        return self.read

    @property
    def training(self) -> float:
        """The most in a step."""
        return self._held + self.activations + self.temporaries + self.slack

    @property
    def scoring(self) -> float:
        """The most while a validation is scored."""
        return self._held + self.scored + self.slack

    @property
    def _held(self) -> float:
        return self.process + self.kernels + self.weights + self.trained + self.states + self.best

    @property
    def peak(self) -> float:
        """The most at any time."""
        return max(self.loading, self.training, self.scoring)

    @property
    def fullest(self) -> str:
        """When that is."""
        return max(("loading", "training", "scoring"), key=lambda when: getattr(self, when))

    def terms(self) -> dict[str, Any]:
        """Every term and sum by name."""
        sums = {name: getattr(self, name) for name in ("loading", "training", "scoring", "peak", "fullest")}
        return asdict(self) | sums


def kernels(traced: Traced) -> int:
    """How many are made for a batch: one for each shape of a product of oneDNN's, which makes none for fp32."""
    made = (work for work in traced.work if work.name in PRODUCTS and work.name != OWN_PRODUCT)
    return len({work.shape for work in made if work.dtype != torch.float32})


def memory_of(
    rehearsed: Rehearsed,
    machine: Machine,
    settings: Training,
    *,
    loaded: float,
    file: float,
    forked: bool,
    classifier: bool,
    shapes: tuple[int, int] = (1, 1),
) -> Memory:
    """The memory of a rehearsed run.

    `loaded`: bytes of the base as it is loaded, before it is brought to the precision of the run; `file`: bytes of
    the file that it is read from; `shapes`: how many different sizes batches have, of steps and of what is scored.
    """
    trained = rehearsed.trained
    step = rehearsed.step
    large = max(step.peak, rehearsed.scoring.peak)
    process = machine.processes["forked" if forked else "fresh"]
    return Memory(
        process=process.classifying if classifier else process.training,
        weights=rehearsed.frozen,
        trained=4 * trained,
        gradients=4 * trained,
        states=STATES[settings.optimiser] * trained,
        best=4 * trained if settings.keep == "best" else 0.0,
        activations=step.forward,
        temporaries=max(0.0, step.peak - step.forward),
        scored=rehearsed.scoring.peak,
        kernels=min(_MOST_KERNELS, kernels(step) * (shapes[0] - 1) + kernels(rehearsed.scoring) * (shapes[1] - 1))
        * machine.kernel,
        slack=min((machine.slack - 1) * large, machine.most_slack) + machine.heap,
        read=0.0 if machine.cuda else process.loading + loaded + file,
    )
