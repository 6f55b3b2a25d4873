"""Tensors without numbers, and how operations run on them.

A `Shape` is, to PyTorch, a tensor of the CPU, with autograd and autocast. It knows its layout and the memory that it is
in, which several may share. What an operation gives for inputs of certain layouts is worked out once, on the meta
device, and then remembered: to look it up takes a tenth of the time.

What depends on numbers is answered by the caller's word: how many tokens of a batch are scored.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from deltatune.planning.forms import NOTHING, Form, aten, form_of
from deltatune.planning.work import Work, work_of

META = torch.device("meta")
_CPU = torch.device("cpu")

Layout = tuple[tuple[int, ...], tuple[int, ...], int, torch.dtype]
"""Sizes, strides, offset and type."""


@dataclass(slots=True)
class Life:
    """The time in which a storage lives."""

    born: int
    """In which operation."""
    gone: int | None
    """The first operation without it; None while it lives."""
    size: int
    maker: str
    """The module that ran when it was made, where somebody asked."""


class Memory:
    """A storage. All shapes in it hold it, so it goes with the last of them, whoever held that."""

    __slots__ = ("_life", "_storage", "_work", "size")

    def __init__(self, size: int, life: Life | None = None, work: Sequence[Any] = ()) -> None:
        self.size, self._life, self._work = size, life, work
        self._storage: torch.UntypedStorage | None = None

    @property
    def storage(self) -> torch.UntypedStorage:
        """On the meta device; made where it is asked for."""
        if self._storage is None:
            self._storage = torch.UntypedStorage(self.size, device=META)  # type: ignore[no-untyped-call]
        return self._storage

    def __del__(self) -> None:
        if self._life is not None:
            self._life.gone = len(self._work)


class Shape(Tensor):
    """A tensor without numbers that PyTorch takes for one on the CPU."""

    laid: Layout
    memory: Memory
    is_meta = True  # a model of such is an outline
    __slots__ = ["laid", "memory"]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # needs no wrapping

    @staticmethod
    def __new__(cls, meta: Tensor) -> "Shape":
        """A shape like a tensor on the meta device, in memory of its own."""
        if isinstance(meta, Shape):  # made within a trace
            return meta
        return _shape(_layout(meta), Memory(meta.untyped_storage().nbytes()))

    @property
    def meta(self) -> Tensor:
        """The same on the meta device, where it shares its storage as well."""
        size, stride, offset, dtype = self.laid
        empty = torch.empty(0, dtype=dtype, device=META)
        return empty.set_(self.memory.storage, offset, size, stride)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Outside of a trace: the same, and nothing is noted."""
        return run(operation, args, kwargs or {})[0]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Shape({[*self.shape]}, {self.dtype})"


def _shape(layout: Layout, memory: Memory) -> Shape:
    size, stride, offset, dtype = layout
    made: Shape = Tensor._make_wrapper_subclass(
        Shape, size, strides=stride, storage_offset=offset, dtype=dtype, device=_CPU, requires_grad=False
    )
    made.laid, made.memory = layout, memory
    return made


def _layout(meta: Tensor) -> Layout:
    return tuple(meta.shape), meta.stride(), int(meta.storage_offset()), meta.dtype


class _Given(NamedTuple):
    """A tensor that an operation gives."""

    layout: Layout
    source: int | None
    """Which argument's memory it is in; None for memory of its own."""
    size: int
    """Bytes of that memory."""


_seen: dict[Any, tuple[Any, Work | None]] = {}
"""What operations gave for inputs of certain layouts, and what they were."""


def run(
    operation: Any,
    args: Sequence[Any],
    options: Mapping[str, Any],
    new: Callable[[int], Memory] = Memory,
    scored: int | None = None,
) -> tuple[Any, Work | None]:
    """Runs an operation; gives what it gives, and what it was. `new` makes memory of so many bytes."""
    form = form_of(operation)
    key: Any
    found: Any
    try:
        key = (form, *map(_key, args), *((name, _key(value)) for name, value in options.items()))
        found = _seen.get(key)
    except TypeError:
        key = found = None
    if found is None:
        return _worked_out(operation, form, key, args, options, new, scored)
    given, work = found
    if form.writes is not None:
        return _written(form, args, options), work
    if type(given) is _Given:
        return _made(given, args, new), work
    return [None if one is None else _made(one, args, new) for one in given], work


def _made(given: _Given, args: Sequence[Any], new: Callable[[int], Memory]) -> Shape:
    memory = new(given.size) if given.source is None else args[given.source].memory
    return _shape(given.layout, memory)


def _written(form: Form, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
    if form.writes == NOTHING:
        return None
    return args[form.writes] if isinstance(form.writes, int) else options[cast(str, form.writes)]


def _key(value: Any) -> Any:
    """What of an argument decides what an operation gives; raises `TypeError` where that is not known."""
    kind = type(value)
    if kind is Shape:
        return value.laid
    if kind is list:
        return tuple(map(_key, value))
    if isinstance(value, Tensor):
        if value.ndim or value.device == META:
            raise TypeError("a tensor of its own")
        return value.dtype
    return kind, value


def _worked_out(
    operation: Any,
    form: Form,
    key: Any,
    args: Sequence[Any],
    options: Mapping[str, Any],
    new: Callable[[int], Memory],
    scored: int | None,
) -> tuple[Any, Work | None]:
    """Runs an operation on the meta device, and remembers it where it will be the same the next time."""
    known: dict[int, Shape] = {}
    inner = [_bare(value, known) for value in args]
    named = {name: _bare(value, known) for name, value in options.items() if name != "pin_memory"}
    read = inner if operation.namespace == "aten" else [*inner, *named.values()]
    if form.writes is not None:
        work = work_of(operation, read, _written(form, inner, named))
        if key is not None:
            _seen[key] = None, work
        return _written(form, args, options), work
    answer = _ANSWERS.get(operation._overloadpacket)
    out = answer(inner, scored) if answer is not None else _on_meta(operation, form, inner, named, (args, options))
    work = work_of(operation, read, out)
    memories = {shape.memory.storage._cdata: shape.memory for shape in known.values()}

    def wrapped(one: Any) -> Any:
        if not isinstance(one, Tensor) or one.device != META:
            return one
        if (same := known.get(id(one))) is not None:
            same.laid = _layout(one)
            return same
        storage = one.untyped_storage()
        if (memory := memories.get(storage._cdata)) is None:
            memory = memories[storage._cdata] = new(storage.nbytes())
        return _shape(_layout(one), memory)

    several = isinstance(out, (tuple, list))
    made = [wrapped(one) for one in (out if several else [out])]
    if key is not None and answer is None and not any(one is same for one in made for same in known.values()):
        given = [_given(one, args, form) for one in made]
        if all(isinstance(one, _Given) or (several and one is None) for one in given):
            _seen[key] = given if several else given[0], work
    return (made if several else made[0]), work


def _given(one: Any, args: Sequence[Any], form: Form) -> _Given | Any:
    """How it is given the next time; itself, where nobody knows."""
    if type(one) is not Shape:
        return one
    for place, value in enumerate(args):
        if type(value) is Shape and value.memory is one.memory:
            return _Given(one.laid, place, 0)
    return _Given(one.laid, None, one.memory.size) if form.fresh else one


def _on_meta(operation: Any, form: Form, inner: list[Any], named: dict[str, Any], given: Any) -> Any:
    if operation._overloadpacket is aten.index:
        inner = [inner[0], _as_places(inner[1]), *inner[2:]]
    if form.has_device and not any(value is META for value in inner):
        named = {**named, "device": META}
    with torch._C._DisableTorchDispatch():
        out = operation(*inner, **named)
        if form.reshapes:  # the shape itself has another form, too
            args, options = given
            operation(*args, **options)
    return out


def _empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    with torch._C._DisableTorchDispatch():
        return torch.empty(shape, dtype=dtype, device=META)


def _nonzero(args: Sequence[Any], scored: int | None) -> Tensor:
    numbers = args[0].numel()
    return _empty(numbers if scored is None else min(scored, numbers), args[0].ndim)


def _unique(args: Sequence[Any], _: int | None) -> tuple[Tensor, ...]:
    like = args[0]
    return _empty(like.numel(), dtype=like.dtype), _empty(*like.shape), _empty(like.numel())


_ANSWERS: Mapping[Any, Callable[[Sequence[Any], int | None], Any]] = {
    aten._local_scalar_dense: lambda args, _: torch.ones((), dtype=args[0].dtype).item(),
    aten.equal: lambda args, _: False,
    aten.nonzero: _nonzero,
    aten._unique2: _unique,
    aten.is_nonzero: lambda args, _: True,
}
"""What depends on numbers."""


def _bare(value: Any, known: dict[int, Shape]) -> Any:
    """An argument with meta tensors in the place of shapes, which are put into `known`.

    No closure: one that calls itself is a cycle, and would keep every tensor until the garbage is collected.
    """
    if type(value) is Shape:
        with torch._C._DisableTorchDispatch():
            meta = value.meta
        known[id(meta)] = value
        return meta
    if isinstance(value, Tensor):
        return value if value.device == META or not value.ndim else value.to(META)
    if isinstance(value, torch.device):
        return META
    if isinstance(value, torch.Generator):
        return None
    if isinstance(value, (list, tuple)):
        return [_bare(one, known) for one in value]
    return value


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
            new: Tensor = Shape(torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META))
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            made[tensor] = new
        return made[tensor]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = cast(Any, of(tensor))
