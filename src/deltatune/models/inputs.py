"""Virtual tokens before a model's input: hooks that put them in front and cut off what the model gives for them.

    input_ids        (examples, tokens)            →  inputs_embeds  (examples, virtual + tokens, width)
    attention_mask   ones in front                    position_ids   0 … virtual − 1, then the text's, moved
    token_type_ids   zeros in front                   hidden states  without the first `virtual` positions

So everything outside of the base model sees real tokens alone: a classifier finds the token that it pools, labels fit
and virtual positions carry no loss. In generation with a cache they are put in front at the first step; at later steps
only the mask and the positions count them. The text's positions are counted over what is not padding, so that padding
on the left and on the right give the same.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from deltatune.errors import UserError
from deltatune.models.adapted import Added
from deltatune.models.positions import first_position, text_positions
from deltatune.models.stacks import Call, Stack, read_call

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class InputPrompt(Added):
    """The virtual tokens that `prompt` gives, before a stack's input.

    In an encoder–decoder they stand before the encoder's input and nothing is cut off: the decoder attends to them.
    """

    def __init__(self, model: PreTrainedModel, stack: Stack, prompt: nn.Module, tokens: int) -> None:
        super().__init__()
        self.prompt = prompt
        self.stack = stack
        self.tokens = tokens
        self.on = False
        self.handles: list[RemovableHandle] = [
            stack.module.register_forward_pre_hook(self._extend, with_kwargs=True),
        ]
        if stack.reader is not None:
            decoder = model.get_submodule(stack.reader)
            self.handles.append(decoder.register_forward_pre_hook(self._extend_reader, with_kwargs=True))
            return
        self.handles.append(stack.module.register_forward_hook(self._cut, with_kwargs=True))
        pooler = getattr(stack.module, "pooler", None)
        if isinstance(pooler, nn.Module):
            self.handles.append(pooler.register_forward_pre_hook(self._cut_pooled))

    def switch(self, on: bool) -> None:
        """Puts the virtual tokens in front from now on, or no longer."""
        self.on = on

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for handle in self.handles:
            handle.remove()

    def _extend(self, stack: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if not self.on:
            return None
        call = read_call(self.stack, args, kwargs)
        arguments, first = call.arguments, first_position(stack.config)
        mask = self._mask(call)
        if "position_ids" in self.stack.order:
            given = arguments.get("position_ids")
            given = text_positions(mask, call.length, first) if given is None else given
            arguments["position_ids"] = given + self.tokens
        arguments["attention_mask"] = self._in_front(mask, 1)
        if call.cached:  # the virtual tokens are in the cache
            return (), arguments
        embedded = arguments.get("inputs_embeds")
        if embedded is None:
            embedded = stack.get_input_embeddings()(arguments["input_ids"])
        virtual = self.prompt().to(embedded.dtype).expand(call.examples, -1, -1)
        arguments["input_ids"], arguments["inputs_embeds"] = None, torch.cat([virtual, embedded], 1)
        if "position_ids" in arguments:
            places = torch.arange(first, first + self.tokens, device=call.device)
            text = arguments["position_ids"].expand(call.examples, -1)
            arguments["position_ids"] = torch.cat([places.expand(call.examples, -1), text], 1)
        if arguments.get("token_type_ids") is not None:
            arguments["token_type_ids"] = self._in_front(arguments["token_type_ids"], 0)
        return (), arguments

    def _mask(self, call: Call) -> Int[Tensor, "examples total"]:
        """The mask of the text so far. Raises `UserError` for one that is no mask of whole texts."""
        mask = call.arguments.get("attention_mask")
        known = call.cached - self.tokens if call.cached else 0
        if mask is None:
            return torch.ones(call.examples, known + call.length, dtype=torch.long, device=call.device)
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise UserError(
                "virtual tokens need an attention mask of 0 and 1 for each token", "give it as the tokenizer does"
            )
        if mask.shape[1] != known + call.length:
            raise UserError(
                f"the attention mask has {mask.shape[1]} tokens, the text and its cache have {known + call.length}",
                "a cache must come from this model with this adapter active",
            )
        return mask

    def _in_front(self, x: Int[Tensor, "examples length"], value: int) -> Int[Tensor, "examples longer"]:
        return torch.cat([x.new_full((x.shape[0], self.tokens), value), x], 1)

    def _extend_reader(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Lets the decoder see the encoded virtual tokens: its mask over the encoder's output becomes as long."""
        encoded, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if not self.on or encoded is None or mask is None or encoded.shape[1] != mask.shape[1] + self.tokens:
            return None
        return args, {**kwargs, "encoder_attention_mask": self._in_front(mask, 1)}

    def _cut(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        embedded = kwargs.get("inputs_embeds")
        if not self.on or embedded is None or kwargs["attention_mask"].shape[1] != embedded.shape[1]:
            return output  # a later step of generation
        return _without(output, embedded.shape[1], self.tokens)

    def _cut_pooled(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A pooler inside of the base model takes the first token: it is given the real ones."""
        return (args[0][:, self.tokens :], *args[1:]) if self.on else None


def _without(output: Any, length: int, tokens: int) -> Any:
    """What a model gave, its hidden states (examples, length, width) without their first `tokens` positions."""
    if isinstance(output, Tensor):
        hidden: Float[Tensor, "examples length width"] = output
        return hidden[:, tokens:] if output.ndim == 3 and output.shape[1] == length else output
    if isinstance(output, ModelOutput):
        for name, value in output.items():
            output[name] = _without(value, length, tokens)
        return output
    if isinstance(output, tuple):
        return tuple(_without(value, length, tokens) for value in output)
    return output
