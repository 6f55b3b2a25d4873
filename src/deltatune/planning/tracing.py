"""Running a training step on shapes alone: which operations it runs, and how much memory lives at its fullest.

The code that trains is run as it stands, so a plan follows it when it changes. Its tensors are shapes (`shapes.py`).
`Trace` notes each operation that runs on them, and counts the bytes of every storage from its first tensor to the end
of its last one, whoever holds it: a variable, a module, or autograd.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deltatune.planning.shapes import Life, Memory, run
from deltatune.planning.work import Traced, Work


@dataclass
class Repeat:
    """A stretch of a trace that stands for others like it: what ran in it is counted `times` more.

    Places are numbers of operations. What it made and left alive is there as often, until that is gone.
    """

    times: float
    forward: list[int] = field(default_factory=list)
    """Where it begins; where it ends and the next one like it begins; where that one ends."""
    backward: list[int] = field(default_factory=list)
    """Where its backward pass begins and ends; empty where it has none."""

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The stretches that ran."""
        both = (self.forward[:2], self.backward[:2])
        return [(span[0], span[1]) for span in both if len(span) == 2]


_Lived = tuple[int, int, int, str]
"""The first operation with a storage, the first one without it, its bytes, and its maker."""


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the block every operation is run on shapes; `traced` then says what was seen."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it compiles nothing: to make sure of that would take a tenth of a plan

    def __init__(self, scored: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.traced = Traced()
        self._scored = scored
        self._work: list[Work | None] = []
        """What each operation was; None where it only was a call."""
        self._lives: list[Life] = []
        """Of all memory that was made."""
        self._begun: int | None = None
        """With which operation the backward pass began."""
        self.repeats: list[Repeat] = []
        self.places: list[str] | None = None
        """The modules that run now, the innermost last, where the caller keeps them: what is kept is told by them."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operation."""
        if self._begun is None and torch._C._current_graph_task_id() != -1:  # the first one of a backward pass
            self._begun = self.now
        out, work = run(operation, args, kwargs or {}, self._new, self._scored)
        self._work.append(work)
        return out

    def _new(self, size: int) -> Memory:
        life = Life(self.now, None, size, self.places[-1] if self.places else "")
        self._lives.append(life)
        return Memory(size, life, self._work)

    def __exit__(self, *exception: Any) -> None:
        """Ends the trace."""
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self.traced = self._told()

    @property
    def now(self) -> int:
        """How many operations have run."""
        return len(self._work)

    def _told(self) -> Traced:
        end = self.now + 1
        lives = [(one.born, end if one.gone is None else one.gone, one.size, one.maker) for one in self._lives]
        begun = end if self._begun is None else self._begun
        work: Counter[Work] = Counter(one for one in self._work if one)
        calls, alive = float(self.now), np.zeros(end + 1)
        kept: Counter[str] = Counter()

        def live(begin: int, until: int, size: float, maker: str) -> None:
            alive[begin] += size
            alive[until] -= size
            if begin < begun < until:
                kept[maker] += cast(int, size)

        for one in lives:
            live(*one)
        for repeat in self.repeats:
            for first, last in repeat.spans:
                calls += repeat.times * (last - first)
                for what, count in Counter(self._work[first:last]).items():
                    if what:
                        work[what] += cast(int, repeat.times * count)
            for stretch in _left(repeat, lives, begun, end):
                live(*stretch)
        kept = +kept
        return Traced(work, float(alive.cumsum().max()), float(kept.total()), calls, kept if self.places else Counter())


def _left(repeat: Repeat, lives: Sequence[_Lived], begun: int, end: int) -> Iterator[tuple[int, int, float, str]]:
    """What the stretches that are not there have alive, and when, as if they had run right after the one that is."""
    times = repeat.times
    if len(repeat.forward) < 3:
        return
    first, last, following = repeat.forward
    back, done = repeat.backward if len(repeat.backward) == 2 else (end, end)
    kept, gradients = 0, 0
    for born, gone, size, maker in lives:
        left = times * size
        if first <= born < last < gone:
            if begun <= gone <= done < end:
                yield first, back, left, maker  # the last of them runs beside what the others left
                kept += size
            elif gone > following:  # or else the next of them takes it away
                yield first, gone, left, maker
        elif back <= born < done and gone == end:
            yield done, end, left, maker
            gradients += size
    if done < end:  # what the forward pass kept goes while gradients come
        yield back, done, times * max(kept, gradients), ""
