"""The bases that can be planned: all that can be loaded, and common ones of the hub by their configuration alone.

`bases.json` has the facts of the latter: the fields in which a configuration differs from its architecture's default,
and the parameters that the model is known to have, which the tests hold the outline against. `pooler`: how many of them
a classifier leaves out. `own_output_layer`: its files hold one, though its configuration would have it tied.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from deltatune.errors import UserError, nearest
from deltatune.models.base import outline
from deltatune.models.places import MODELS, Place, find_base
from deltatune.models.quantise import Storages


@cache
def known() -> Mapping[str, Mapping[str, Any]]:
    """The bases whose configuration ships with the library, by their hub id."""
    text = (Path(__file__).parent / "bases.json").read_text(encoding="utf-8")
    facts: Mapping[str, Mapping[str, Any]] = json.loads(text)
    return facts


def planned_base(name: str) -> Place:
    """Where the configuration of a base is; nothing is fetched for one that is known.

    A hub id may be written without its owner. Raises `UserError` for a name that is none.
    """
    short = {hub_id.partition("/")[2].lower(): hub_id for hub_id in known()}
    found = name if name in known() else short.get(name.lower())
    if found is not None and name not in MODELS and not Path(name).expanduser().is_dir():
        return Place(found, found, "known configuration", config=known()[found]["config"])
    try:
        return find_base(name)
    except UserError as error:
        close = nearest(name, [*MODELS, *known(), *short])
        raise UserError(error.message, f"{error.hint}; nearest known: {', '.join(close[:3])}") from error


def planned_outline(place: Place, labels: Sequence[str], storage: Storages = "") -> PreTrainedModel:
    """The base on the meta device, as `deltatune.models.base.outline` gives it and as its files are known to be."""
    model = outline(place, labels=labels, storage=storage)
    if place.config is not None and known()[place.id].get("own_output_layer") and not labels:
        layer = cast(nn.Linear, model.get_output_embeddings())
        layer.weight = nn.Parameter(torch.empty_like(layer.weight))
    return model
