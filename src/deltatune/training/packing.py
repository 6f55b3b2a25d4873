"""Texts one after another in a single row, each seeing only itself: nothing is computed for padding, and little twice.

The attention has to tell the texts apart. Ours and flash attention do, when they are told where each begins; whether an
architecture passes that on to its attention, and lets the positions begin anew, is tried out. Ours can be told, too,
that all texts begin with the same tokens, an instruction or what a template puts before every prompt: these stand in
the row once, and every text sees them. In a decoder they are the same for all texts, so it is the same computation, and
the gradients of all texts meet there. Dropout would have to drop others for each text: with it nothing is shared.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from deltatune import kernels
from deltatune.data.batches import ROWS, STEP
from deltatune.methods import SoftPrompt
from deltatune.models import short_attention
from deltatune.models.attach import attachment
from deltatune.models.products import has_products
from deltatune.training.modes import evaluating
from deltatune.training.precision import Computed, alike

log = logging.getLogger("deltatune")

Hidden = Callable[[Mapping[str, Any]], Float[Tensor, "rows length width"]]
"""Calls a decoder; gives its states."""

_FLASH = ("flash_attention_2", "flash_attention_3")


@dataclass(frozen=True)
class Row:
    """Texts in one row."""

    inputs: dict[str, Any]
    """What a decoder is called with; its outputs have one row."""
    places: Int[Tensor, "texts length"]
    """Where in the row each token of each text stands."""


class Packing:
    """How a model reads texts in one row. With `shares` their common beginning stands there once."""

    def __init__(self, model: PreTrainedModel, hidden: Hidden, shares: bool) -> None:
        self.shares = shares
        self._model, self._hidden = model, hidden
        self._own = _own(model)
        # So that few shapes occur (see `data.batches`), where PyTorch multiplies: our loops take any.
        self._step = 1 if self._own and kernels.wide() else STEP
        self._rows = 1 if has_products(model) else ROWS
        self._draws: bool | None = None
        """Whether something in the model is random while it trains; None until it was tried."""

    def row(self, ids: Int[Tensor, "texts length"], lengths: Int[Tensor, " texts"]) -> Row:
        """The first `lengths` tokens of texts padded on the right.

        Where shapes are to be few a text keeps of what comes after what makes its own tokens a multiple of 8, and a
        last text, which nobody reads, makes those of the row a multiple of 32.
        """
        ids, lengths = ids.to(self._model.device), lengths.to(self._model.device)
        shared = common_beginning(ids, lengths) if self.shares and not self._random() else 0
        before = torch.full_like(lengths, shared)
        before[0] = 0
        own = (lengths - before + self._step - 1) // self._step * self._step
        ends = (before + own).clamp_(max=ids.shape[1])
        begins = (ends - before).cumsum(0) - ends  # where each text's first token would stand
        numbers = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        kept = (numbers >= before[:, None]) & (numbers < ends[:, None])
        tokens, positions = ids[kept], numbers[kept]
        added = -len(tokens) % self._rows
        bounds = F.pad((ends - before).cumsum(0), (1, min(1, added)))
        bounds[-1] = len(tokens) + added
        bounds, longest = bounds.to(torch.int32), max(int(ends.max()), added)
        inputs = {
            "input_ids": F.pad(tokens, (0, added))[None],
            "position_ids": F.pad(positions, (0, added))[None],
            "use_cache": False,  # with a cache texts in one row would see each other
            **{"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest},
        }
        if self._own:  # handed on in this form: else Transformers makes one of tokens × tokens, which nobody reads
            inputs["attention_mask"] = torch.zeros(1, 1, 1, 1, device=ids.device)
        if shared:
            inputs["shared_tokens"] = shared
        return Row(inputs, torch.where(numbers < before[:, None], numbers, begins[:, None] + numbers))

    def _random(self) -> bool:
        if not self._model.training:
            return False
        if self._draws is None:  # not by what it gives: a fresh adapter adds nothing, whatever was dropped on the way
            with torch.no_grad(), torch.random.fork_rng():
                before = torch.get_rng_state()
                self._hidden({"input_ids": _ids(self._model), "use_cache": False})
                self._draws = not torch.equal(before, torch.get_rng_state())
        return self._draws


def length_step(model: PreTrainedModel) -> int:
    """Padded lengths are to be multiples of this: 1 where products are our own, which take any shape as well."""
    return 1 if has_products(model) else STEP


def common_beginning(ids: Int[Tensor, "texts length"], lengths: Int[Tensor, " texts"]) -> int:
    """Tokens with which all texts begin; to each at least one is left. None where there is one text alone."""
    if len(ids) == 1:
        return 0
    most = int(lengths.min()) - 1
    same = (ids[:, :most] == ids[0, :most]).all(0)
    return int(same.long().cumprod(0).sum())


def find_packing(model: PreTrainedModel, hidden: Hidden, precision: Computed, shares: bool = True) -> Packing | None:
    """How a decoder reads packed texts, tried out: it gives the same as for padded ones. None where it cannot.

    Before each text stands what a soft prompt adds, so that texts of a model that has one stay in rows of their own.
    """
    attached = attachment(model)
    if model.config.is_encoder_decoder or not (_own(model) or model.config._attn_implementation in _FLASH):
        return None
    if attached is not None and any(isinstance(part.method, SoftPrompt) for part in attached.parts):
        return None
    ids, lengths = _ids(model), torch.tensor([11, 8, 7, 4], device=model.device)
    mask = (torch.arange(ids.shape[1], device=model.device) < lengths[:, None]).long()
    rows, places = mask.nonzero(as_tuple=True)
    with evaluating(model):
        padded = hidden({"input_ids": ids, "attention_mask": mask})[rows, places]
        for shared in (True, False) if shares and _own(model) else (False,):
            packing = Packing(model, hidden, shared)
            row = packing.row(ids, lengths)
            try:
                alone = hidden(row.inputs)[0, row.places[rows, places]]
            except (TypeError, ValueError, RuntimeError, IndexError) as error:
                log.debug("texts are not packed: %s", error)
                continue
            if alike(alone, padded, "bf16" if model.dtype == torch.bfloat16 else precision):
                return packing
    return None


def _ids(model: PreTrainedModel) -> Int[Tensor, "4 11"]:
    """Four texts to try things out, which begin with the same tokens."""
    ids = torch.arange(44, device=model.device).view(4, 11)
    ids[:, :3] = ids[0, :3]
    return torch.remainder(ids, model.config.get_text_config().vocab_size)


def _own(model: PreTrainedModel) -> bool:
    return bool(model.config._attn_implementation == short_attention.NAME)
