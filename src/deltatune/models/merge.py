"""Merging what was trained into the base's weights, and taking it out again to the same bits."""

from deltatune.errors import UserError
from deltatune.methods import WeightDelta
from deltatune.models.attach import Model, adapted_layers, attachment


def merge(model: Model) -> Model:
    """Writes the merged weight of every adapted layer over the base's, so that inference costs nothing more.

    `unmerge` restores the base's bits. Raises `UserError`, with the model unchanged, where the method cannot be merged
    or a merged weight is not finite. A selection is in the weights already: nothing is to do.
    """
    done = attachment(model)
    if done is None:
        raise UserError("nothing is attached to this model, so there is nothing to merge")
    if isinstance(done.method, WeightDelta) and done.method.unmergeable:
        raise UserError(f"{done.method.name} cannot be merged: {done.method.unmergeable}")
    for path, layer in adapted_layers(model).items():
        try:
            layer.merge()
        except UserError as error:
            unmerge(model)
            raise UserError(f"{path}: {error.message}", error.hint) from error
    return model


def unmerge(model: Model) -> Model:
    """Puts back the base's weights as they were before `merge`, bit for bit."""
    for layer in adapted_layers(model).values():
        layer.unmerge()
    return model


def fold(model: Model) -> Model:
    """Merges for good: every adapted layer is replaced by its base layer with the merged weight, an ordinary module."""
    merge(model)
    for path, layer in adapted_layers(model).items():
        model.set_submodule(path, layer.base)
    del model.attachment
    return model
