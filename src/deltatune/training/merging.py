"""A saved adapter merged into its base for good: a folder in Transformers' layout that needs nothing of ours."""

from pathlib import Path

import torch
from torch import Tensor

from deltatune.errors import UserError
from deltatune.files import new_folder
from deltatune.models.adapters import SavedAdapter
from deltatune.models.base import quiet
from deltatune.models.merge import Merged, fold, merge
from deltatune.models.quantise import dequantise
from deltatune.training.saved import Ready, open_adapter


def merge_saved(folder: Path, out: Path, *, base: str = "", tolerance: float = 1e-3) -> tuple[SavedAdapter, Merged]:
    """Writes the base with a saved adapter merged in, and its tokenizer, to the new folder `out`, in fp32.

    Raises `UserError`, with nothing written, where `out` holds something, the method cannot be merged, or an output on
    a few texts of random tokens changes by more than `tolerance` of the largest. `base` is that of `open_adapter`.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is no empty folder", "name a new one, so that nothing is lost")
    ready = open_adapter(folder, base=base, precision="fp32")
    model = ready.base.model
    done = merge(model, _probe(ready))
    difference, largest = done.difference or 0.0, done.largest or 0.0
    if not difference <= tolerance * largest:  # so that NaN is refused as well
        raise UserError(
            f"merging changes an output by {difference:.2g}, more than {tolerance:g} of the largest, {largest:.2g}",
            "keep the adapter beside its base, or allow for it with --tolerance",
        )
    dequantise(fold(model))
    with new_folder(out) as new, quiet():
        model.save_pretrained(new)
        ready.base.tokenizer.save_pretrained(new)
    return ready.saved, done


def _probe(ready: Ready) -> dict[str, Tensor]:
    """A few texts of random tokens, encoded as texts are, so that special tokens stand where they belong."""
    tokenizer = ready.base.tokenizer
    known = min(len(tokenizer), ready.base.model.config.vocab_size)
    ids = torch.randint(known, (4, 16), generator=torch.Generator().manual_seed(0))
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in ids.tolist()]
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=ready.max_length, return_tensors="pt")
    return {name: tensor.to(ready.base.model.device) for name, tensor in encoded.items()}
