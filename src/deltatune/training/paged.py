"""AdamW whose moments live where the system can page them out (the paged optimisers of QLoRA, arXiv 2305.14314, §3).

On CUDA that is unified memory, through bitsandbytes. Elsewhere it is a file mapped into memory: its pages count as
resident while there is room for them, but they are no anonymous memory, and the system writes them back and drops them
when memory is short. The fused kernel of `torch.optim.AdamW` updates them in place, from one end to the other and with
no copy, so the trajectory is that of `adamw` bit for bit.
"""

import mmap
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.errors import UserError

_LINE = 64
"""Bytes of a cache line, which no two moments share."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


def paged_adamw(groups: list[dict[str, Any]], folder: Path | None = None) -> torch.optim.Optimizer:
    """The paged AdamW for where the parameters are; `folder` holds the moments off CUDA.

    Raises `UserError` on CUDA without bitsandbytes, for another device than CUDA or CPU, and for a folder that cannot
    hold the moments.
    """
    [device] = {parameter.device.type for group in groups for parameter in group["params"]}
    if device == "cuda":
        return _on_cuda(groups)
    if device != "cpu":
        raise UserError(f"the paged optimiser works on CPU and CUDA, not on {device}", "use optimiser=adamw8bit there")
    return MappedAdamW(groups, folder)


class MappedAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, fused, with its moments in a memory-mapped file for each parameter group.

    The files are in `folder`, or the system's temporary one, which should be on a disk: on a tmpfs they would be memory
    after all. They have no name there, so that nothing is left behind, however the process ends.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], folder: Path | None = None) -> None:
        self._folder = Path(folder or tempfile.gettempdir())
        super().__init__(groups, fused=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group and maps its moments; raises `UserError` where the folder cannot hold them."""
        super().add_param_group(param_group)
        parameters: list[nn.Parameter] = self.param_groups[-1]["params"]
        sizes = [-(-parameter.nbytes // _LINE) * _LINE for parameter in parameters for _ in _MOMENTS]
        pages = iter(torch.split(_mapped(sum(sizes), self._folder), sizes))
        for parameter in parameters:
            self.state[parameter]["step"] = torch.zeros(())
            for name in _MOMENTS:
                self.state[parameter][name] = _like(parameter, next(pages))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies the moments of a state dict of this class or of `torch.optim.AdamW` into the mapped files."""
        mapped = {parameter: dict(state) for parameter, state in self.state.items()}
        super().load_state_dict(state_dict)
        for parameter, state in mapped.items():
            for name, tensor in state.items():
                loaded = self.state[parameter].get(name)
                tensor.zero_() if loaded is None else tensor.copy_(loaded)
            self.state[parameter] = state


def _like(parameter: nn.Parameter, pages: Tensor) -> Tensor:
    """A tensor of zeros over the first of `pages`, laid out as the moments of `torch.optim.AdamW` are."""
    strides = torch.empty_like(parameter, device="meta").stride()
    return pages[: parameter.nbytes].view(parameter.dtype).as_strided(parameter.shape, strides)


def _mapped(size: int, folder: Path) -> Tensor:
    """Zeros in a file of `folder` that has no name, or loses it at once, and that goes with the last of its users."""
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            _reserve(file.fileno(), size)
            return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)
    except OSError as error:
        raise UserError(
            f"could not keep {size:,} bytes of moments in {folder}: {error.strerror}",
            "free some space, or name another folder with paged_folder",
        ) from error


def _reserve(file: int, size: int) -> None:
    """Makes a file that long with all of its blocks on the disk: a full one is an error now and no crash later."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
        return
    for start in range(0, size, 1 << 20):
        os.write(file, bytes(min(1 << 20, size - start)))


def _on_cuda(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import PagedAdamW32bit
    except ImportError as error:
        raise UserError(
            "the paged optimiser needs bitsandbytes on CUDA", "pip install bitsandbytes, or use optimiser=adamw8bit"
        ) from error
    optimizer: torch.optim.Optimizer = PagedAdamW32bit(groups)
    return optimizer
