"""A saved adapter merged into its base for good: a folder of its own, in the storage one asks for."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltatune.errors import UserError
from deltatune.files import new_folder
from deltatune.models.adapters import SavedAdapter
from deltatune.models.base import quiet
from deltatune.models.merge import fold, merge, outputs
from deltatune.models.quantise import dequantise, quantise, read_storages
from deltatune.training.saved import Ready, open_adapter, score
from deltatune.training.task import Scores
from deltatune.weights import DENSE

log = logging.getLogger("deltatune")

TOLERANCE: Mapping[str, float] = {"fp32": 1e-3, "bf16": 0.03}
"""Most that merging may change an output, as a share of the largest. In bf16 every weight is rounded to 8 bits."""


@dataclass(frozen=True)
class MergedModel:
    """What was written, and how far its outputs on a few texts of random tokens are from the adapted model's."""

    saved: SavedAdapter
    layers: int
    """Weights that were replaced by their merged ones."""
    storage: str
    """How the weights were asked to be stored: bf16, fp32, or a quantised storage."""
    difference: float
    """The largest difference of any output."""
    mean_difference: float
    """The mean size of the differences."""
    largest: float
    """The largest output in size, as adapted."""
    before: Scores | None
    """Scores of the adapted model on the validation split that it was trained with; None unless it was requantised."""
    after: Scores | None
    """Scores of the merged one."""


def merge_saved(
    folder: Path, out: Path, *, base: str = "", storage: str = "bf16", tolerance: float | None = None
) -> MergedModel:
    """Writes the base with a saved adapter merged in, and its tokenizer, to the new folder `out`.

    A base in fewer bits is decoded, and the merged weights are written in bf16 or fp32: a model of Transformers. Any
    other `storage`, such as nf4, encodes them again, which loses accuracy: how much is measured, on the adapter's own
    validation split as well where it records its data. That folder is a base to `load`. `base` is
    that of `open_adapter`.

    Raises `UserError`, with nothing written, where `out` holds something, the method cannot be merged, there is no
    such storage, or an output changes by more than `tolerance` of the largest: left out, that of `TOLERANCE`, and none
    for weights in fewer bits.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is no empty folder", "name a new one, so that nothing is lost")
    storages = {} if storage in DENSE else read_storages(storage)
    if not (storages or storage in DENSE):
        raise UserError("an empty storage says nothing", "use bf16, fp32, or one of fewer bits such as nf4")
    ready = open_adapter(folder, base=base, precision="fp32")
    model = ready.base.model
    probe = _probe(ready)
    adapted, before = outputs(model, probe), _scored(ready) if storages else None
    layers = merge(model).layers
    dequantise(fold(model))
    if storages:
        quantise(model, storages)
    dtype = DENSE.get(storage, torch.bfloat16)
    _cast(model, dtype)
    _cast(model, torch.float32)  # what is written, computed with as precisely as the adapted model
    difference = (outputs(model, probe) - adapted).abs()
    done = MergedModel(
        saved=ready.saved,
        layers=layers,
        storage=storage,
        difference=difference.max().item(),
        mean_difference=difference.mean().item(),
        largest=adapted.abs().max().item(),
        before=before,
        after=_scored(ready) if before else None,
    )
    _refuse_difference(done, TOLERANCE.get(storage) if tolerance is None else tolerance)
    _cast(model, dtype)
    with new_folder(out) as new, quiet():
        model.save_pretrained(new)
        ready.base.tokenizer.save_pretrained(new)
    return done


def _refuse_difference(done: MergedModel, tolerance: float | None) -> None:
    if not math.isfinite(done.difference):
        raise UserError("an output of the merged model is not finite", "keep the adapter beside its base")
    if tolerance is not None and not done.difference <= tolerance * done.largest:
        raise UserError(
            f"merging changes an output by {done.difference:.2g}, more than {tolerance:g} of the largest, "
            f"{done.largest:.2g}",
            "keep the adapter beside its base, store more precisely with --storage, or allow for it with --tolerance",
        )


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts the parameters; buffers stay as precise as they are, and codes as well."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _scored(ready: Ready) -> Scores | None:
    """Scores on the validation split that the adapter was trained with; None where there is none to be had."""
    if not ready.saved.about.get("data"):
        return None
    try:
        return score(ready, "", "validation")
    except UserError as error:
        log.warning("not scored on its validation split: %s", error.message)
        return None


def _probe(ready: Ready) -> dict[str, Tensor]:
    """A few texts of random tokens, encoded as texts are, so that special tokens stand where they belong."""
    tokenizer = ready.base.tokenizer
    known = min(len(tokenizer), ready.base.model.config.vocab_size)
    ids = torch.randint(known, (4, 16), generator=torch.Generator().manual_seed(0))
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in ids.tolist()]
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=ready.max_length, return_tensors="pt")
    return {name: tensor.to(ready.base.model.device) for name, tensor in encoded.items()}
