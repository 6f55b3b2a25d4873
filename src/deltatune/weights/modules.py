"""Which modules hold a linear weight, and that weight as methods see it."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from deltatune.weights.dense import DenseWeight
from deltatune.weights.frozen import FrozenWeight
from deltatune.weights.quantised import QuantisedLinear, QuantisedWeight


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one that holds a linear weight we can adapt, in whatever storage."""
    return isinstance(module, nn.Linear | Conv1D | QuantisedLinear)


def is_transposed(module: nn.Module) -> bool:
    """Whether the ordinary form of a linear layer has its weight as (in, out): that of Transformers' `Conv1D`."""
    return isinstance(module, Conv1D) or (isinstance(module, QuantisedLinear) and module.transposed)


def weight_of(module: nn.Module) -> FrozenWeight:
    """The frozen weight that a linear module or an embedding holds; it follows the module when that is moved or cast.

    An embedding is a linear map of one-hot vectors: its W is (width, vocabulary).
    """
    if isinstance(module, Conv1D | nn.Embedding):
        return DenseWeight(module, transposed=True)
    if isinstance(module, nn.Linear):
        return DenseWeight(module, transposed=False)
    if isinstance(module, QuantisedLinear):
        return QuantisedWeight(module)
    raise TypeError(f"{type(module).__name__} holds no weight that can be adapted")
