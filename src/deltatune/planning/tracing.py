"""Running a training step on shapes alone: which operations it runs, and how much memory lives at its fullest.

The code that trains is run as it stands, so a plan follows it when it changes. Its tensors are `Shape`s: to PyTorch
they are tensors of the CPU, with autograd and autocast, and what they hold is a tensor on the meta device, which has no
numbers. `Trace` stands between: it runs each operation on the meta tensors, notes it, and counts the bytes of every
storage from its first tensor to the end of its last one, whoever holds it: a variable, a module, or autograd.

What depends on numbers is answered by the caller's word: how many tokens of a batch are scored.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deltatune.planning.forms import META, form_of, fresh
from deltatune.planning.work import Traced, Work, work_of

aten = torch.ops.aten
_CPU = torch.device("cpu")


class Shape(Tensor):
    """A tensor without numbers that PyTorch takes for one on the CPU."""

    meta: Tensor
    is_meta = True  # a model of such is an outline
    __slots__ = ["meta"]
    __torch_function__ = torch._C._disabled_torch_function_impl  # what a subclass' functions give is as it is

    @staticmethod
    def __new__(cls, meta: Tensor) -> "Shape":
        """A shape around a tensor on the meta device."""
        if isinstance(meta, Shape):  # made within a trace
            return meta
        made: Shape = Tensor._make_wrapper_subclass(
            cls,
            meta.size(),
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=_CPU,
            requires_grad=False,
        )
        made.meta = meta
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Outside of a trace: the same, and nothing is noted."""
        return _Quiet()._run(operation, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Shape({[*self.shape]}, {self.dtype})"


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


class _Life(NamedTuple):
    """The time in which a storage lives."""

    born: int
    """In which operation."""
    gone: int
    """The first operation without it."""
    size: int
    maker: str
    """The module that ran when it was made, where somebody asked."""


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the block every operation is run on shapes; `traced` then says what was seen."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it compiles nothing: to make sure of that would take a tenth of a plan

    def __init__(self, scored: int | None = None, there: nn.Module | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.traced = Traced()
        self._scored = scored
        self._live: dict[int, _Storage] = {}
        for tensor in (*there.parameters(), *there.buffers()) if there is not None else ():
            if isinstance(tensor, Shape):  # is there before, and so are views of it
                self._live[tensor.meta.untyped_storage()._cdata] = _Storage(0, 0, "", 1)
        self._callbacks: dict[int, weakref.ref[Tensor]] = {}
        self._work: list[Work | None] = []
        """What each operation was; None where it only was a call."""
        self._lives: list[_Life] = []
        """Of what is gone."""
        self._begun: int | None = None
        """With which operation the backward pass began."""
        self.repeats: list[Repeat] = []
        self.places: list[str] | None = None
        """The modules that run now, the innermost last, where the caller keeps them: what is kept is told by them."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operation."""
        return self._run(operation, args, kwargs or {})

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
        lives = [*self._lives, *(_Life(one.born, end, one.size, one.maker) for one in self._live.values())]
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

    def _run(self, operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        packet = operation._overloadpacket
        if operation.namespace == "deltatune":
            return self._decode(args)
        if answer := _ANSWERS.get(packet):
            return self._wrap(answer(self, args), {}, operation, args)
        known: dict[int, Shape] = {}

        inner = [_bare(value, known) for value in args]
        options = {name: _bare(value, known) for name, value in kwargs.items() if name != "pin_memory"}
        if packet is aten.index:
            inner[1] = _as_places(inner[1])
        form = form_of(operation)
        if form.has_device and not any(value is META for value in inner):
            options["device"] = META
        if form.writes:  # what it writes to is there, and its shape stays
            out = inner[0] if form.writes is True else options[form.writes]
            return self._wrap(out, known, operation, inner)
        with torch._C._DisableTorchDispatch():
            if form.fresh:
                out, work = fresh(operation, inner, options)
                return self._wrap(out, known, operation, inner, work)
            out = operation(*inner, **options)
            if torch.Tag.inplace_view in operation.tags:  # the shape itself has another form, too
                operation(*args, **kwargs)
        return self._wrap(out, known, operation, inner)

    def _decode(self, args: Any) -> None:
        codes, *_, words, out, _ = args
        numbers = out.numel()
        size = numbers * out.element_size() + codes.nbytes * numbers // max(1, codes.numel())
        self._work.append(Work(f"decode {words.partition(':')[0]}", out.dtype, (numbers,), size))

    def _wrap(
        self, out: Any, known: Mapping[int, Shape], operation: Any, inputs: list[Any], work: Work | None = None
    ) -> Any:
        if isinstance(out, Tensor):
            wrapped: Any = self._one(out, known)
        elif isinstance(out, (tuple, list)):
            wrapped = type(out)([self._one(one, known) if isinstance(one, Tensor) else one for one in out])
        else:
            wrapped = out
        if self._begun is None and torch._C._current_graph_task_id() != -1:  # the first operation of a backward pass
            self._begun = self.now
        self._work.append(work or work_of(operation, inputs, out))
        return wrapped

    def _one(self, meta: Tensor, known: Mapping[int, Shape]) -> Tensor:
        if (same := known.get(id(meta))) is not None:
            return same
        if meta.device != META:
            return meta
        made = Shape(meta)
        self._watch(made, meta)
        return made

    def _watch(self, made: Shape, meta: Tensor) -> None:
        storage = meta.untyped_storage()
        key = storage._cdata
        entry = self._live.get(key)
        if entry is None:
            maker = self.places[-1] if self.places else ""
            self._live[key] = entry = _Storage(len(self._work), storage.nbytes(), maker)
        entry.tensors += 1

        def gone(ref: Any, key: int = key, entry: _Storage = entry, me: int = id(made)) -> None:
            self._callbacks.pop(me, None)
            entry.tensors -= 1
            if not entry.tensors:
                del self._live[key]
                self._lives.append(_Life(entry.born, len(self._work), entry.size, entry.maker))

        self._callbacks[id(made)] = weakref.ref(made, gone)


@dataclass(slots=True)
class _Storage:
    """A storage that is alive."""

    born: int
    size: int
    maker: str
    tensors: int = 0


def _left(repeat: Repeat, lives: Sequence[_Life], begun: int, end: int) -> Iterator[tuple[int, int, float, str]]:
    """What the stretches that are not there have alive, and when, as if they had run right after the one that is."""
    times = repeat.times
    if len(repeat.forward) < 3:
        return
    first, last, following = repeat.forward
    back, done = repeat.backward if len(repeat.backward) == 2 else (end, end)
    kept, gradients = 0, 0
    for one in lives:
        left = times * one.size
        if first <= one.born < last < one.gone:
            if begun <= one.gone <= done < end:
                yield first, back, left, one.maker  # the last of them runs beside what the others left
                kept += one.size
            elif one.gone > following:  # or else the next of them takes it away
                yield first, one.gone, left, one.maker
        elif back <= one.born < done and one.gone == end:
            yield done, end, left, one.maker
            gradients += one.size
    if done < end:  # what the forward pass kept goes while gradients come
        yield back, done, times * max(kept, gradients), ""


class _Quiet(Trace):  # type: ignore[no-untyped-call]
    """Runs operations on shapes outside of any trace."""

    def _watch(self, made: Shape, meta: Tensor) -> None:
        return


def _empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _nonzero(trace: Trace, args: Any) -> Tensor:
    scored = args[0].numel() if trace._scored is None else trace._scored
    return _empty(min(scored, args[0].numel()), args[0].ndim)


def _unique(trace: Trace, args: Any) -> tuple[Tensor, ...]:
    like = args[0]
    return _empty(like.numel(), dtype=like.dtype), _empty(*like.shape), _empty(like.numel())


def _nothing(trace: Trace, args: Any) -> None:
    return None


_ANSWERS: Mapping[Any, Callable[[Trace, Any], Any]] = {
    aten._local_scalar_dense: lambda trace, args: torch.ones((), dtype=args[0].dtype).item(),
    aten.equal: lambda trace, args: False,
    aten.nonzero: _nonzero,
    aten._unique2: _unique,
    aten.is_nonzero: lambda trace, args: True,
}
"""What depends on numbers."""


def _bare(value: Any, known: dict[int, Shape]) -> Any:
    """An argument with meta tensors in the place of shapes, which are put into `known`.

    No closure: one that calls itself is a cycle, and would keep every tensor until the garbage is collected.
    """
    if type(value) is Shape:
        known[id(value.meta)] = value
        return value.meta
    if value is None or type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor):
        return value if value.device == META or not value.ndim else value.to(META)
    if isinstance(value, torch.device):
        return META
    if isinstance(value, torch.Generator):
        return None
    if isinstance(value, (list, tuple)):
        return [_bare(one, known) for one in value]
    return value


_PLAIN = frozenset([int, float, bool, str, torch.dtype])


def _as_places(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Indices with places in the stead of masks, as many as these could have at most."""
    found: list[Tensor | None] = []
    for one in indices:
        masks = isinstance(one, Tensor) and one.dtype == torch.bool
        found += [_empty(one.numel())] * one.ndim if masks and one is not None else [one]
    return found


def shaped(model: nn.Module) -> None:
    """Puts shapes in the place of a meta model's parameters and buffers, shared ones once."""
    made: dict[Tensor, Tensor] = {}

    def of(tensor: Tensor) -> Tensor:
        if tensor not in made:
            bare = tensor.meta.to(tensor.dtype) if isinstance(tensor, Shape) else tensor.detach().to(META)
            new: Tensor = Shape(bare)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            made[tensor] = new
        return made[tensor]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = cast(Any, of(tensor))
