"""Texts one after another in a single row, each seeing only itself: nothing is computed for padding.

The attention has to tell the texts apart. Ours and flash attention do, when they are told where each begins; whether an
architecture passes that on to its attention, and lets the positions begin anew, is tried out.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from deltatune.data.batches import ROWS, STEP
from deltatune.methods import SoftPrompt
from deltatune.models import short_attention
from deltatune.models.attach import attachment
from deltatune.training.modes import evaluating
from deltatune.training.precision import Computed, alike

log = logging.getLogger("deltatune")

_FLASH = ("flash_attention_2", "flash_attention_3")


def packed(
    model: PreTrainedModel, ids: Int[Tensor, "texts length"], mask: Int[Tensor, "texts length"]
) -> dict[str, Any]:
    """What a decoder is called with for texts padded on the right; its outputs have one row.

    So that few shapes occur (see `data.batches`) a text keeps of its padding what makes its length a multiple of 8, and
    a last text, which nobody reads, makes that of the row a multiple of 32.
    """
    ids, mask = ids.to(model.device), mask.to(model.device)
    lengths = _kept_lengths(mask)
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    kept = places < lengths[:, None]
    tokens = ids[kept]
    added = -len(tokens) % ROWS
    ends = F.pad(lengths, (0, min(1, added)), value=added).cumsum(0)
    bounds = F.pad(ends, (1, 0)).to(torch.int32)
    longest = max(int(lengths.max()), added)
    inputs = {
        "input_ids": F.pad(tokens, (0, added))[None],
        "position_ids": F.pad(places[kept], (0, added))[None],
        "use_cache": False,  # with a cache texts in one row would see each other
        **{"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest},
    }
    if _own(model):  # Transformers hands on a mask of this form, and makes none of tokens × tokens, which nobody reads
        inputs["attention_mask"] = torch.zeros(1, 1, 1, 1, device=ids.device)
    return inputs


def beginnings(mask: Int[Tensor, "texts length"]) -> Int[Tensor, " texts"]:
    """Where in the row of `packed` each text begins."""
    lengths = _kept_lengths(mask)
    return lengths.cumsum(0) - lengths


def _kept_lengths(mask: Int[Tensor, "texts length"]) -> Int[Tensor, " texts"]:
    return mask.sum(1).add_(STEP - 1).div_(STEP, rounding_mode="floor").mul_(STEP).clamp_(max=mask.shape[1])


def can_pack(
    model: PreTrainedModel,
    hidden: Callable[[Mapping[str, Any]], Float[Tensor, "rows length width"]],
    precision: Computed,
) -> bool:
    """Whether a decoder gives the same for packed texts as for padded ones: `hidden` calls it and is compared.

    Before each text stands what a soft prompt adds, so that texts of a model that has one stay in rows of their own.
    """
    attached = attachment(model)
    if model.config.is_encoder_decoder or not (_own(model) or model.config._attn_implementation in _FLASH):
        return False
    if attached is not None and any(isinstance(part.method, SoftPrompt) for part in attached.parts):
        return False
    lengths = torch.tensor([11, 8, 7, 3], device=model.device)
    ids = torch.arange(44, device=model.device).view(4, 11) % model.config.get_text_config().vocab_size
    mask = (torch.arange(11, device=model.device) < lengths[:, None]).long()
    rows, places = mask.nonzero(as_tuple=True)
    with evaluating(model):
        padded = hidden({"input_ids": ids, "attention_mask": mask})[rows, places]
        try:
            alone = hidden(packed(model, ids, mask))[0, beginnings(mask)[rows] + places]
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            log.debug("texts are not packed: %s", error)
            return False
    return alike(alone, padded, "bf16" if model.dtype == torch.bfloat16 else precision)


def _own(model: PreTrainedModel) -> bool:
    return bool(model.config._attn_implementation == short_attention.NAME)
