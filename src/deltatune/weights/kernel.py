"""Decoding four bits with bitsandbytes' kernels, where that package is installed: on a CPU ten times as fast.

They compute level · scale in fp32 and round once, as `codec` does: the same bits, but for results in bf16 so small that
they have no full precision there (below 2⁻¹²⁶), which become 0. On a CPU the kernel is taken from the package's shared
library, since importing the package takes seconds and may fetch code from a hub. Its functions are no public interface:
they are used from releases that are known. On CUDA it is the package's own operator. Both are used after they gave what
they should on the device.
"""

import ctypes
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from deltatune.weights.levels import levels

_RELEASES = ("0.50.",)
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_BLOCK = 64
_CUDA_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)

Kernel = Callable[[Tensor, Tensor, Tensor, int], None]
"""Fills its third argument from codes and fp32 scales in blocks of so many numbers, of which it has whole ones."""


def decode_blocks(
    format: str,
    codes: Integer[Tensor, " bytes"],
    scales: Float[Tensor, " blocks"],
    out: Float[Tensor, " numbers"],
    block: int,
) -> int:
    """Decodes the whole blocks that fit into `out`, and returns how many numbers these are: 0 where it has no kernel.

    Codes and scales begin where `out` does.
    """
    kernel = _kernel(format, out.dtype, out.device) if out.is_contiguous() else None
    count = len(out) // block * block if out.is_cpu or block in _CUDA_BLOCKS else 0
    if kernel is None or count == 0:
        return 0
    kernel(codes, scales, out[:count], block)
    return count


@lru_cache
def _kernel(format: str, dtype: torch.dtype, device: torch.device) -> Kernel | None:
    """The kernel that decodes that format to that type on that device; None where there is none that does."""
    makers = {"cpu": _cpu_kernel, "cuda": _operator}
    if format not in ("nf4", "fp4") or dtype not in _TYPES or device.type not in makers:
        return None
    kernel = makers[device.type](format, dtype)
    return kernel if kernel and _decodes(kernel, format, dtype, device) else None


def _operator(format: str, dtype: torch.dtype) -> Kernel | None:
    """The package's operator, which importing it registers."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return None
    operator = torch.ops.bitsandbytes.dequantize_4bit

    def kernel(codes: Tensor, scales: Tensor, out: Tensor, block: int) -> None:
        used = codes[: len(out) // 2], scales[: len(out) // block]
        out.copy_(operator(*used, block, format, list(out.shape), dtype).view_as(out))

    return kernel


def _cpu_kernel(format: str, dtype: torch.dtype) -> Kernel | None:
    """The function of the package's library for CPUs."""
    library = _library()
    if library is None:
        return None
    try:
        function = library[f"cdequantize_blockwise_cpu_{format}_{_TYPES[dtype]}"]
    except AttributeError:
        return None
    function.restype = None
    function.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_longlong] * 3]

    def kernel(codes: Tensor, scales: Tensor, out: Tensor, block: int) -> None:
        # A row is one block: rows of several would have to be whole numbers of blocks, and threads share rows.
        function(codes.data_ptr(), scales.data_ptr(), out.data_ptr(), block, len(out) // block, block)

    return kernel


def _decodes(kernel: Kernel, format: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether it gives each pair of codes its levels, times the scale of their block."""
    codes, scales = torch.arange(256).to(torch.uint8), torch.linspace(0.001, 3.7, 512 // _BLOCK)
    pairs = torch.stack((codes >> 4, codes & 15), 1).view(-1, _BLOCK).int()
    out = torch.full((512,), torch.nan, dtype=dtype, device=device)
    kernel(codes.to(device), scales.to(device), out, _BLOCK)
    return torch.equal(out.cpu(), (levels(format)[pairs] * scales[:, None]).to(dtype).view(-1))


@lru_cache
def _library() -> ctypes.CDLL | None:
    """The package's library, where its kernels are the fast ones; it runs on the threads that PyTorch has."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    try:
        package = distribution("bitsandbytes")
        if not package.version.startswith(_RELEASES):
            return None
        return ctypes.CDLL(str(package.locate_file("bitsandbytes/libbitsandbytes_cpu.so")))
    except (PackageNotFoundError, OSError):
        return None
