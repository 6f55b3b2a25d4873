"""A soft prompt on a model: virtual tokens in front of the input, or keys and values in every attention layer."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltatune.methods import Seat, SoftPrompt
from deltatune.models.inputs import InputPrompt
from deltatune.models.part import Part
from deltatune.models.prefixes import AttentionPrefix
from deltatune.models.stacks import Stack, find_stack

log = logging.getLogger("deltatune")


@dataclass(frozen=True, eq=False)
class Prompted(Part):
    """The module of one soft prompt, on the stack that it acts on."""

    method: SoftPrompt
    holder: InputPrompt | AttentionPrefix
    path: str
    """Of the holder in the model."""
    peft: Mapping[str, Any]
    """The fields of adapter_config.json that the model decides."""
    trains_base: bool = False

    def __str__(self) -> str:
        return f"{self.method.name}: {self.method.virtual_tokens} virtual tokens"

    def trained(self) -> list[nn.Parameter]:
        """The parameters of the prompt or of what makes it."""
        return list(self.holder.parameters())

    def switch(self, on: bool) -> None:
        """Puts the virtual tokens in front, or leaves the model as it was."""
        self.holder.switch(on)

    def remove(self, model: nn.Module) -> None:
        """Takes the hooks and the module off the model."""
        self.holder.remove()
        parent, _, name = self.path.rpartition(".")
        delattr(model.get_submodule(parent), name)

    def stored(self) -> dict[str, Tensor]:
        """The virtual tokens, as PEFT has them, and what makes them."""
        return self.method.stored(self.holder.prompt)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies the prompt, or what makes it."""
        self.method.restore(self.holder.prompt, tensors)

    def to_peft(self, model: nn.Module) -> dict[str, Any]:
        """The method's own fields, and those of every soft prompt."""
        return {**self.peft, **self.method.to_peft(), "num_virtual_tokens": self.method.virtual_tokens}


def put_prompt(
    model: PreTrainedModel, method: SoftPrompt, name: str, head: tuple[str, ...], generator: torch.Generator
) -> Prompted:
    """Puts a soft prompt on the model, switched off.

    Raises `UserError` where the architecture has no place for it, or no positions for so many virtual tokens.
    """
    stack, seat = find_stack(model, method)
    embeddings = None
    if method.place == "input" and not stack.module.get_input_embeddings().weight.is_meta:
        embeddings = stack.module.get_input_embeddings().weight.detach()
    prompt = method.prompt(seat, embeddings, generator).to(stack.module.device)
    kind = InputPrompt if method.place == "input" else AttentionPrefix
    holder = kind(model, stack, prompt, method.virtual_tokens).train(model.training)
    own = f"{method.name}_{name}"
    stack.module.add_module(own, holder)
    path = f"{stack.path}.{own}" if stack.path else own
    where = f"in {len(seat.keys)} attention layers" if seat.keys else "at the input"
    log.info("%s: %d virtual tokens %s of %s", method.name, method.virtual_tokens, where, type(stack.module).__name__)
    return Prompted(method, holder, path, _peft_fields(model, stack, seat, head))


def _peft_fields(model: PreTrainedModel, stack: Stack, seat: Seat, head: tuple[str, ...]) -> dict[str, Any]:
    """What PEFT asks its config for instead of the model.

    Where there is an encoder PEFT cannot give each layer of the decoder its own prefix: the type is then one of ours.
    """
    config, both = stack.module.config, bool(model.config.is_encoder_decoder)
    shared = getattr(config, "num_key_value_heads", None) if seat.keys else None
    task = "SEQ_2_SEQ_LM" if both else "CAUSAL_LM" if model.can_generate() else "FEATURE_EXTRACTION"
    return {
        "task_type": "SEQ_CLS" if head else task,
        "num_transformer_submodules": 1,
        "num_layers": len(seat.keys) or getattr(config, "num_hidden_layers", None),
        "num_attention_heads": shared or getattr(config, "num_attention_heads", None),
        "token_dim": seat.keys[0] if seat.keys else seat.width,
        **({"peft_type": "DELTATUNE_PREFIX"} if both and seat.keys else {}),
    }
