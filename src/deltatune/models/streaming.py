"""Quantising while loading: Transformers reads a checkpoint tensor by tensor; each is stored before the next is read.

It has an interface for that, which keeps what it knows of every architecture: names of tensors in older checkpoints,
tied weights, shards. A model that was saved quantised is read through the same interface.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from deltatune.errors import UserError
from deltatune.models.quantise import METHOD, note_storages, place_storages
from deltatune.weights import QuantisedLinear, Storage, is_linear, is_transposed, parse_storage, weight_of


@register_quantization_config(METHOD)
class StorageConfig(QuantizationConfigMixin):  # type: ignore[misc]  # Transformers has no types here
    """What is asked for, by target, and in a saved model the layers of each storage."""

    def __init__(
        self,
        storages: Mapping[str, str],
        layers: Mapping[str, list[str]] | None = None,
        quant_method: str = METHOD,
        see: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        self.storages, self.layers, self.quant_method = dict(storages), layers, quant_method
        self.see = see
        """Is shown each weight (out, in) as it was read, by the path of its layer."""


@register_quantizer(METHOD)
class StreamingQuantiser(HfQuantizer):  # type: ignore[misc]
    """Puts a `QuantisedLinear` in the place of each layer: when its weight is read, or, in a saved model, before."""

    def __init__(self, quantization_config: StorageConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.placed: dict[str, Storage] = {}
        self.problem: UserError | None = None
        """What is wrong with a tensor. Transformers would go on and report it in words of its own."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        config = self.quantization_config
        if not self.pre_quantized:
            self.placed = place_storages(model, config.storages)
            return
        linear = {path for path, module in model.named_modules() if is_linear(module)}
        for words, paths in (config.layers or {}).items():
            for path in paths:
                if path not in linear:
                    raise UserError(f"its configuration stores {path}, which is no linear layer of it")
                put_empty(model, path, parse_storage(words))

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **options: Any) -> bool:
        """Whether that parameter is the weight of a layer that is to be stored otherwise."""
        path, _, name = param_name.rpartition(".")
        return name == "weight" and path in self.placed

    def get_quantize_ops(self) -> "StoreWeight":
        """What is done with such a weight."""
        return StoreWeight(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        if self.problem is not None:
            raise self.problem
        # From here on it is an ordinary module, which any loop may train and `save_pretrained` saves.
        self.remove_quantization_config(model)
        note_storages(model, self.quantization_config.storages)
        return model

    def is_serializable(self) -> bool:
        """Whether the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters over it can be trained."""
        return True


class StoreWeight(ConversionOps):  # type: ignore[misc]
    """Stores one weight that was read, in a layer that takes the place of the ordinary one."""

    def __init__(self, quantiser: StreamingQuantiser) -> None:
        self.quantiser = quantiser

    def convert(
        self,
        input_dict: dict[str, Tensor | list[Tensor]],
        model: nn.Module | None = None,
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        """Takes {name of the weight: the weight}; leaves nothing for Transformers to put in its place."""
        assert model is not None
        for name, value in input_dict.items():
            path, tensor = name.removesuffix(".weight"), value[0] if isinstance(value, list) else value
            layer = model.get_submodule(path)
            wanted = cast(Tensor, layer.weight).shape
            try:
                if tensor.shape != wanted:
                    raise UserError(f"it has shape {[*tensor.shape]}, not {[*wanted]}")
                if see := self.quantiser.quantization_config.see:
                    see(path, tensor.T if is_transposed(layer) else tensor)
                _put(model, path, QuantisedLinear.of(layer, self.quantiser.placed[path], tensor))
            except UserError as error:
                self.quantiser.problem = self.quantiser.problem or UserError(f"{name}: {error.message}", error.hint)
                continue
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}


def put_empty(model: nn.Module, path: str, storage: Storage) -> None:
    """Puts a quantised layer without numbers, on the meta device, in the place of an ordinary one."""
    layer = model.get_submodule(path)
    weight, transposed = weight_of(layer), is_transposed(layer)
    bias = layer.bias is not None
    empty = QuantisedLinear(weight.in_, weight.out, storage, bias=bias, transposed=transposed, device="meta")
    empty.dtype = cast(Tensor, layer.weight).dtype
    _put(model, path, empty)


def _put(model: nn.Module, path: str, layer: QuantisedLinear) -> None:
    """Puts the layer in its place, marked as one that Transformers is not to initialise."""
    layer._is_hf_initialized = True  # type: ignore[assignment]
    model.set_submodule(path, layer)
