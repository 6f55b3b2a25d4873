"""Running a training step on shapes alone: which operations it runs, and how much memory lives at its fullest.

The code that trains is run as it stands, so a plan follows it when it changes. Its tensors are `Shape`s: to PyTorch
they are tensors of the CPU, with autograd and autocast, and what they hold is a tensor on the meta device, which has no
numbers. `Trace` stands between: it runs each operation on the meta tensors, notes it, and counts the bytes of every
storage from its first tensor to the end of its last one, whoever holds it: a variable, a module, or autograd.

What depends on numbers is answered by the caller's word: how many tokens of a batch are scored.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

aten = torch.ops.aten
_META, _CPU = torch.device("meta"), torch.device("cpu")


class Shape(Tensor):
    """A tensor without numbers that PyTorch takes for one on the CPU."""

    meta: Tensor
    __slots__ = ["meta"]

    @staticmethod
    def __new__(cls, meta: Tensor) -> "Shape":
        made: Shape = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
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
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Outside of a trace: the same, and nothing is noted."""
        return _Quiet()._run(operation, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"Shape({[*self.shape]}, {self.dtype})"


class Work(NamedTuple):
    """One operation and the sizes that decide what it costs."""

    name: str
    """Such as mm, or native_layer_norm."""
    dtype: torch.dtype
    """Of its largest tensor."""
    shape: tuple[int, ...]
    """Of a product (batch, m, k, n): (batch, m, k) · (batch, k, n). Of anything else the numbers that it writes."""
    nbytes: int
    """Bytes that it reads and writes."""


@dataclass
class Traced:
    """What a trace saw."""

    work: Counter[Work] = field(default_factory=Counter)
    """How often each operation ran. Views of what is there are not counted."""
    peak: float = 0.0
    """Most bytes that were alive at once, what was there before the trace left out."""
    marks: dict[str, float] = field(default_factory=dict)
    """Bytes that were alive at named moments."""
    calls: float = 0.0
    """Operations in all, views among them."""

    @property
    def flops(self) -> float:
        """Of the products, a multiplication and an addition being two."""
        return sum(count * 2 * math.prod(work.shape) for work, count in self.work.items() if work.name in PRODUCTS)


PRODUCTS: Mapping[str, Callable[..., tuple[int, ...]]] = {
    "mm": lambda a, b, *_: (1, a.shape[0], a.shape[1], b.shape[1]),
    "addmm": lambda c, a, b, *_: (1, a.shape[0], a.shape[1], b.shape[1]),
    "addmm_": lambda c, a, b, *_: (1, a.shape[0], a.shape[1], b.shape[1]),
    "bmm": lambda a, b, *_: (a.shape[0], a.shape[1], a.shape[2], b.shape[2]),
    "baddbmm": lambda c, a, b, *_: (a.shape[0], a.shape[1], a.shape[2], b.shape[2]),
    "mv": lambda a, b, *_: (1, a.shape[0], a.shape[1], 1),
}
"""The operations that multiply matrices, with their sizes."""


class Trace(TorchDispatchMode):
    """Within the block every operation is run on shapes and noted in `traced`."""

    def __init__(self, scored: int | None = None) -> None:
        super().__init__()
        self.traced = Traced()
        self._scored = scored
        self._live: dict[int, list[int]] = {}  # storage → bytes, tensors
        self._now = 0
        self._callbacks: dict[int, weakref.ref[Tensor]] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operation."""
        return self._run(operation, args, kwargs or {})

    def mark(self, name: str) -> None:
        """Notes what is alive now."""
        self.traced.marks[name] = self._now

    def restart(self) -> None:
        """Forgets the peak so far."""
        self.traced.peak = self._now

    def _run(self, operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        packet = operation._overloadpacket
        if answer := _ANSWERS.get(packet):
            return self._wrap(answer(self, args), {}, operation, args)
        known: dict[int, Shape] = {}
        flat, form = tree_flatten((args, kwargs))
        for place, value in enumerate(flat):
            if isinstance(value, Shape):
                known[id(value.meta)] = value
                flat[place] = value.meta
            elif isinstance(value, Tensor) and not value.is_meta:
                flat[place] = value.to(_META) if value.ndim else value
            elif isinstance(value, torch.device):
                flat[place] = _META
            elif isinstance(value, torch.Generator):
                flat[place] = None
        inner, options = tree_unflatten(flat, form)
        if packet in _FACTORIES and "device" in {a.name for a in operation._schema.arguments}:
            options["device"] = _META
        options.pop("generator", None) if packet in _RANDOM else None
        options.pop("pin_memory", None)
        with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
            out = operation(*inner, **options)
        return self._wrap(out, known, operation, flat)

    def _wrap(self, out: Any, known: Mapping[int, Shape], operation: Any, inputs: list[Any]) -> Any:
        if isinstance(out, Tensor):
            wrapped: Any = self._one(out, known)
        elif isinstance(out, (tuple, list)):
            wrapped = type(out)([self._one(one, known) if isinstance(one, Tensor) else one for one in out])
        else:
            wrapped = out
        self._note(operation, inputs, out, known)
        return wrapped

    def _one(self, meta: Tensor, known: Mapping[int, Shape]) -> Tensor:
        if (same := known.get(id(meta))) is not None:
            return same
        if not meta.is_meta:
            return meta
        made = Shape(meta)
        self._watch(made, meta)
        return made

    def _watch(self, made: Shape, meta: Tensor) -> None:
        storage = meta.untyped_storage()
        key = storage._cdata
        entry = self._live.get(key)
        if entry is None:
            self._live[key] = entry = [storage.nbytes(), 0]
            self._now += entry[0]
            self.traced.peak = max(self.traced.peak, self._now)
        entry[1] += 1

        def gone(ref: Any, key: int = key, entry: list[int] = entry, me: int = id(made)) -> None:
            self._callbacks.pop(me, None)
            entry[1] -= 1
            if not entry[1]:
                del self._live[key]
                self._now -= entry[0]

        self._callbacks[id(made)] = weakref.ref(made, gone)

    def _note(self, operation: Any, inputs: list[Any], out: Any, known: Mapping[int, Shape]) -> None:
        traced = self.traced
        traced.calls += 1
        name = operation._overloadpacket.__name__
        outputs = [out] if isinstance(out, Tensor) else [one for one in out or () if isinstance(one, Tensor)]
        read = [one for one in inputs if isinstance(one, Tensor)]
        if name in PRODUCTS:
            a = [one for one in tree_flatten(inputs)[0] if isinstance(one, Tensor)]
            shape = PRODUCTS[name](*a)
            size = sum(one.nbytes for one in a) + sum(one.nbytes for one in outputs)
            traced.work[Work(name, outputs[0].dtype, shape, size)] += 1
            return
        if name in _VIEWS or not outputs and not name.endswith("_"):
            return
        sizes = [one.nbytes for one in read if one.is_meta]
        written = max((one.numel() for one in (*outputs, *read)), default=0)
        dtype = max((*outputs, *read), key=lambda one: one.nbytes, default=torch.empty(0)).dtype
        traced.work[Work(name, dtype, (written,), sum(sizes) + sum(one.nbytes for one in outputs))] += 1


class _Quiet(Trace):
    """Runs operations on shapes outside of any trace."""

    def _watch(self, made: Shape, meta: Tensor) -> None:
        return


def _empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=_META)


def _nonzero(trace: Trace, args: Any) -> Tensor:
    scored = args[0].numel() if trace._scored is None else trace._scored
    return _empty(min(scored, args[0].numel()), args[0].ndim)


def _unique(trace: Trace, args: Any) -> tuple[Tensor, ...]:
    like = args[0]
    return _empty(like.numel(), dtype=like.dtype), _empty(*like.shape), _empty(like.numel())


def _nothing(trace: Trace, args: Any) -> None:
    return None


_ANSWERS: Mapping[Any, Callable[[Trace, Any], Any]] = {
    aten._local_scalar_dense: lambda trace, args: 1 if not args[0].is_floating_point() else 1.0,
    aten.equal: lambda trace, args: True,
    aten.nonzero: _nonzero,
    aten._unique2: _unique,
    aten.is_nonzero: lambda trace, args: True,
}
"""What depends on numbers, and decoding, which is no operation of PyTorch's."""

_FACTORIES = {
    *(aten.empty, aten.zeros, aten.ones, aten.full, aten.arange, aten.rand, aten.randn, aten.randint, aten.randperm),
    *(aten.empty_strided, aten.scalar_tensor, aten.eye, aten.linspace, aten.tril_indices, aten.triu_indices),
    *(aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like, aten.rand_like, aten.randn_like),
    *(aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty_strided, aten._to_copy),
}
_RANDOM = {aten.rand, aten.randn, aten.randint, aten.randperm}
_VIEWS = frozenset(
    "view _unsafe_view t transpose permute detach alias expand slice select unsqueeze squeeze split "
    "split_with_sizes unbind as_strided chunk lift_fresh empty empty_like empty_strided new_empty "
    "_reshape_alias diagonal unfold view_as_real view_as_complex _local_scalar_dense equal".split()
)
"""Operations that move nothing."""


def shaped(model: nn.Module) -> None:
    """Puts shapes in the place of a meta model's parameters and buffers, shared ones once."""
    made: dict[Tensor, Tensor] = {}

    def of(tensor: Tensor) -> Tensor:
        if tensor not in made:
            new: Tensor = Shape(tensor.detach().to(_META))
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            made[tensor] = new
        return made[tensor]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = cast(Any, of(tensor))
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                setattr(module, name, of(value))
