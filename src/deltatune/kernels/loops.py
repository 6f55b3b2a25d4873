"""How the compiled loops are asked for and called, and how operators of PyTorch's are made of them."""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from deltatune.kernels.build import library

_BITS = {torch.bfloat16: 16, torch.float32: 32}
_KINDS: dict[str, Any] = {"t": ctypes.c_void_p, "f": ctypes.c_float, "n": ctypes.c_int64}


class Loop:
    """A function of the library. `kinds` has a letter for each argument: t(ensor or none), f(loat), n(umber)."""

    def __init__(self, name: str, kinds: str) -> None:
        self._name = name
        self._kinds = [_KINDS[kind] for kind in kinds]

    def __call__(self, like: Tensor, *arguments: Tensor | float | int | ctypes.Array[Any] | None) -> None:
        """Runs it for the type of `like`; of tensors it is told where they are, so they have to be dense."""
        made = library(_BITS[like.dtype])
        assert not isinstance(made, str), made
        function = getattr(made, self._name)
        if function.argtypes is None:
            function.argtypes, function.restype = self._kinds, None
        function(*[one.data_ptr() if isinstance(one, Tensor) else one for one in arguments])


def ready(*tensors: Tensor) -> bool:
    """Whether the operators take these tensors: all bf16, or all fp32, and on a CPU or without numbers."""
    kind = tensors[0].dtype
    if kind not in _BITS or isinstance(library(_BITS[kind]), str):
        return False
    return {(one.dtype, one.is_cpu or one.is_meta) for one in tensors} == {(kind, True)}


def wide() -> bool:
    """Whether the loops are here, and made for a processor with wide registers."""
    return _says("wide_registers")


def multiplies_pairs() -> bool:
    """Whether the loops have matrix products: on processors that multiply pairs of bf16, in units or not."""
    return _says("multiplies")


def missing() -> str:
    """Why there are none here; empty where there are."""
    found = library(16)
    return found if isinstance(found, str) else ""


def operator(signature: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """An operator of PyTorch's, so that what watches those (a profiler, a plan) sees it, too."""
    name = signature.partition("(")[0]
    _operators.define(signature)  # type: ignore[no-untyped-call]
    _operators.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    made: Callable[..., Any] = getattr(torch.ops.deltatune, name).default
    return made


_operators = torch.library.Library("deltatune", "FRAGMENT")  # type: ignore[no-untyped-call]


def _says(name: str) -> bool:
    made = library(16)
    return not isinstance(made, str) and _flag(made, name)


@cache
def _flag(made: ctypes.CDLL, name: str) -> bool:
    return bool(ctypes.c_int32.in_dll(made, name).value)
