"""What enters the lowest trained block, kept: below it nothing changes while training, so no batch needs it twice.

A block whose output needs no gradient lies below everything that trains. Such blocks run without dropout, whether what
they give is kept or not, and so always give the same for the same batch. That is per batch, not per example: in 16 bits
an example's numbers depend on how many others are computed with it. The batches of a run are the same in every epoch
(see `loop.py`), so what is kept gives the very bits that computing it again would give.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltatune.models.blocks import stacks

log = logging.getLogger("deltatune")

Run = Callable[[], Tensor]
"""Runs the model on some examples; gives its logits."""


class Prefix:
    """The frozen lower blocks of a model, and what their stacks gave for each batch, within a budget of bytes."""

    def __init__(self, model: PreTrainedModel, budget: int = 0, on: Literal["memory", "disk"] = "memory") -> None:
        self.stacks: list[list[nn.Module]] = []
        """The frozen blocks of each stack, from its input on; none where nothing is kept."""
        self._model, self._left, self._on = model, budget, on
        self._kept: dict[tuple[int, ...], list[Any]] = {}
        self._told = False

    def freeze(self, run: Run) -> None:
        """Finds the frozen blocks and switches off what is random up to their end; tries out whether they can be kept.

        `run` is called a few times. Where there is a budget and it cannot be used, one line says why.
        """
        found, before = _frozen(self._model, run)
        for module in before:
            module.eval()
        if not self._left:
            return
        self.stacks = found
        reason = "no block lies below everything that trains" if not found else self._unfit(run)
        if reason:
            self.stacks = []
            log.warning("cache: not used, %s", reason)

    @contextmanager
    def standing_in(self, batch: tuple[int, ...]) -> Iterator[None]:
        """Within the block the frozen blocks give what was kept for this batch; the first time it is kept."""
        if not self.stacks:
            yield
        elif batch in self._kept:
            with _replayed(self.stacks, self._kept[batch]):
                yield
        else:
            with _recorded(self.stacks) as outputs:
                yield
            self._keep(batch, outputs)

    def _keep(self, batch: tuple[int, ...], outputs: list[Any]) -> None:
        size = sum(tensor.nbytes for tensor in _tensors(outputs))
        try:
            if size <= self._left:
                self._kept[batch] = [_mapped(output, self._put) for output in outputs]
                self._left -= size
                return
            reason = "its budget is used up"
        except OSError as error:
            self._left, reason = 0, f"its file could not be written: {error.strerror}"
        if not self._told:
            self._told = True
            log.warning("cache: %s after %d batches; the others are computed anew", reason, len(self._kept))

    def _put(self, tensor: Tensor) -> Tensor:
        """A copy in memory, or in a file that is mapped into memory and gone when nothing refers to it any more."""
        if self._on == "memory" or not tensor.numel():
            return tensor.detach().to("cpu", copy=True)
        with tempfile.NamedTemporaryFile(prefix="deltatune-") as file:
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            file.flush()
            flat = torch.from_file(file.name, shared=False, size=tensor.numel(), dtype=tensor.dtype)
        return flat.view(tensor.shape)

    @torch.no_grad()
    def _unfit(self, run: Run) -> str:
        """Why what these blocks give cannot be kept: tried out, with other random numbers than when it was recorded."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            with _recorded(self.stacks) as outputs:
                run()
            forms = [_form(output) for output in outputs]
            if None in forms:
                return "its blocks give more than tensors"
            torch.manual_seed(1)
            plain = run()
            torch.manual_seed(1)
            with _replayed(self.stacks, outputs):
                again = run()
        return "" if torch.equal(plain, again) else "something random lies below, or what blocks give is used twice"


def _frozen(model: PreTrainedModel, run: Run) -> tuple[list[list[nn.Module]], list[nn.Module]]:
    """The leading blocks of each stack whose output needs no gradient; all that runs until the last of them ends."""
    blocks = [[model.get_submodule(path) for path in stack] for stack in stacks(model)]
    if all(any(parameter.requires_grad for parameter in first.parameters()) for first, *_ in blocks):
        return [], []  # nothing lies below a first block
    called: list[tuple[nn.Module, bool]] = []  # with whether its output needs a gradient

    def see(module: nn.Module, _: Any, output: Any) -> None:
        called.append((module, any(tensor.requires_grad for tensor in _tensors(output))))

    whole = {block for stack in blocks for block in stack}
    leaves = {module for module in model.modules() if not list(module.children())}
    training = {module: module.training for module in model.modules()}
    model.eval()
    with ExitStack() as hooks, torch.enable_grad():
        for module in whole | leaves:
            hooks.callback(module.register_forward_hook(see).remove)
        run()
    for module, was in training.items():
        module.training = was
    still = {module for module, _ in called} - {module for module, needed in called if needed}
    found = [list(takewhile(still.__contains__, stack)) for stack in blocks]
    found = [stack for stack in found if stack]
    lasts = {stack[-1] for stack in found}
    end = max((place for place, (module, _) in enumerate(called, start=1) if module in lasts), default=0)
    # T5 uses one dropout at the input and at the end of a stack: it is off in both places.
    return found, [module for module, needed in called[:end] if not needed]


@contextmanager
def _recorded(stacks: list[list[nn.Module]]) -> Iterator[list[Any]]:
    """Within the block, what the last of each stack gives is put into the list."""
    outputs: list[Any] = [None] * len(stacks)
    with ExitStack() as hooks:
        for place, stack in enumerate(stacks):

            def see(_: nn.Module, __: Any, output: Any, place: int = place) -> None:
                outputs[place] = output

            hooks.callback(stack[-1].register_forward_hook(see).remove)
        yield outputs


@contextmanager
def _replayed(stacks: list[list[nn.Module]], outputs: list[Any]) -> Iterator[None]:
    """Within the block every block of a stack gives at once what its last one gave, so nothing else need be skipped."""
    with ExitStack() as undo:
        for stack, output in zip(stacks, outputs, strict=True):
            for block in stack:
                undo.callback(vars(block).pop, "forward")
                block.forward = partial(_given, output, next(block.parameters()).device)
        yield


def _given(output: Any, device: torch.device, *_: Any, **__: Any) -> Any:
    """A copy of the output, since what comes after may write to it."""
    return _mapped(output, lambda tensor: tensor.to(device, copy=True))


def _mapped(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(output, tuple):
        return tuple(_mapped(one, change) for one in output)
    return change(output) if isinstance(output, Tensor) else output


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, tuple | list):
        return [tensor for one in output for tensor in _tensors(one)]
    return [output] if isinstance(output, Tensor) else []


def _form(output: Any) -> Any:
    """What an output is made of; None for what cannot be kept."""
    if isinstance(output, tuple):
        forms = [_form(one) for one in output if one is not None]
        return None if None in forms else forms
    return Tensor if isinstance(output, Tensor) else None
