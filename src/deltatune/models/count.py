"""How many parameters a method trains on a base, from shapes alone: no weight is read."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from transformers import PreTrainedModel

from deltatune.errors import UserError
from deltatune.methods import Method, Mixed, OverLayers, Selection, SoftPrompt, make
from deltatune.models.attach import attach, find_head
from deltatune.models.base import outline, tasks
from deltatune.models.layers import place
from deltatune.models.places import Place, find_base
from deltatune.models.roles import survey
from deltatune.models.selected import put_selection
from deltatune.models.stacks import find_stack
from deltatune.models.targets import below


@dataclass(frozen=True)
class Counted:
    """The parameters of a method on a base."""

    trainable: int
    """Those that train, a classifier's head among them."""
    head: int
    """Those of a classifier's head, which trains with every method; a language model's is a part of the base."""
    stored: int
    """Numbers that an adapter file holds."""
    total: int
    """All parameters of the adapted model."""
    layers: int
    """Weights that are adapted."""


def count(base: Place, method: Method, labels: Sequence[str] = ()) -> Counted:
    """Counts what `method` adds to the base: to a classifier for these labels, without any to a language model.

    Raises `UserError` for targets that match nothing and hyperparameters that do not fit a layer.
    """
    model = outline(base, labels=labels)
    if isinstance(method, Mixed):
        attach(outline(base, labels=labels), method)  # what a mix may not do is refused
    return count_on(model, method)


def count_on(model: PreTrainedModel, method: Method) -> Counted:
    """Counts what `method` adds to a model, an outline for one, without adding it."""
    if not isinstance(method, Mixed):
        return _count(model, method)
    each = [_count(model, part) for part in method.parts]
    head, plain = each[0].head, sum(parameter.numel() for parameter in model.parameters())
    return Counted(
        trainable=head + sum(part.trainable - head for part in each),
        head=head,
        stored=head + sum(part.stored - head for part in each),
        total=plain + sum(part.total - plain for part in each),
        layers=sum(part.layers for part in each),
    )


def _count(model: PreTrainedModel, method: Method) -> Counted:
    head = find_head(model)
    sizes = _sizes(model)
    in_head, total = sum(size for name, size in sizes.items() if below(name, head)), sum(sizes.values())
    if isinstance(method, OverLayers):
        placed = place(model, method, head)
        sites = list(placed.sites.values())
        shared = method.shared_parameters(sites)
        own = sum(variant.parameters(placed.sites[path]) for path, variant in placed.modules.items())
        stored = in_head + method.stored_parameters(sites)
        for path, variant in placed.modules.items():  # patterns of other ranks
            site = [placed.sites[path]]
            stored += variant.stored_parameters(site) - method.stored_parameters(site)
        return Counted(in_head + own + shared, in_head, stored, total + own + shared, len(sites))
    if isinstance(method, SoftPrompt):
        _, seat = find_stack(model, method)
        own = method.parameters(seat)
        return Counted(in_head + own, in_head, in_head + method.stored_parameters(seat), total + own, len(seat.keys))
    selected = put_selection(model, cast(Selection, method), head).parameters.values()
    trainable = in_head + sum(parameter.numel() for parameter in selected)
    return Counted(trainable, in_head, trainable, total, 0)


@survey
def _sizes(model: PreTrainedModel) -> dict[str, int]:
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


def count_all(methods: Sequence[Mapping[str, Any]], base: str, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Descriptions of methods with their counts on a base; what does not fit it says why instead.

    A base that can write counts as a language model, any other as a classifier with two labels.
    """
    found = find_base(base)
    labels = () if "generation" in tasks(found) else ("0", "1")
    counted = []
    for method in methods:
        try:
            counted.append({**method, **asdict(count(found, make(method["name"], options), labels))})
        except UserError as error:
            if len(methods) == 1:
                raise
            counted.append({**method, "does_not_fit": f"{error.message}; {error.hint}"})
    return counted
