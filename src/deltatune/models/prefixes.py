"""Keys and values in front of those of the text, in every attention layer, through Transformers' attention interface.

An attention module asks the interface for the function that its configuration names. One that has a prefix is given a
copy of its configuration that names `_attend`: that puts the prefix in front, extends the mask and calls the function
that the model's own configuration names, eager or sdpa, chosen before or after. A cache holds the text's keys alone.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, PreTrainedModel

from deltatune.errors import UserError
from deltatune.models import short_attention
from deltatune.models.adapted import Added
from deltatune.models.positions import first_position, text_positions
from deltatune.models.stacks import Stack, read_call

_NAME = "deltatune_prefix"
_KNOWN = ("eager", "sdpa", short_attention.NAME)


class AttentionPrefix(Added):
    """The keys and values that `prompt` gives for each layer, in the attention of a stack's blocks.

    The text's positions come after the virtual ones, where the stack takes positions.
    """

    def __init__(self, model: PreTrainedModel, stack: Stack, prompt: nn.Module, tokens: int) -> None:
        super().__init__()
        self.prompt = prompt
        self.stack = stack
        self.tokens = tokens
        self.modules_by_layer = [model.get_submodule(attention.path) for attention in stack.attentions]
        self.configs = [module.config for module in self.modules_by_layer]
        self.unused = set(range(len(self.configs)))
        """Layers whose attention has not asked for their prefix yet."""
        self.on = False
        self.handles: list[RemovableHandle] = [
            stack.module.register_forward_pre_hook(self._move, with_kwargs=True),
            stack.module.register_forward_hook(self._used),
        ]

    def switch(self, on: bool) -> None:
        """Lets the attention modules ask for `_attend`, or for what they asked for before."""
        if on == self.on:
            return
        self.on = on
        for layer, (module, config) in enumerate(zip(self.modules_by_layer, self.configs, strict=True)):
            if on:
                module.config = copy.copy(config)
                module.config._attn_implementation = _NAME
                module.prefix = _Of(self, layer)
            else:
                module.config = config
                del module.prefix

    def remove(self) -> None:
        """Takes the hooks off the model."""
        self.switch(False)
        for handle in self.handles:
            handle.remove()

    def _move(
        self, stack: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.on or "position_ids" not in self.stack.order:
            return None
        call = read_call(self.stack, args, kwargs)
        given, mask = call.arguments.get("position_ids"), call.arguments.get("attention_mask")
        if given is None:
            if not isinstance(mask, Tensor) or mask.ndim != 2:
                mask = torch.ones(call.examples, call.cached + call.length, dtype=torch.long, device=call.device)
            given = text_positions(mask, call.length, first_position(stack.config))
        return (), {**call.arguments, "position_ids": given + self.tokens}

    def _used(self, stack: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Raises `UserError` where a layer's prefix was not used in a whole forward pass."""
        if self.on and self.unused:
            path = self.stack.attentions[min(self.unused)].path
            raise UserError(
                f"the attention of {path} did not use its prefix", "use a method that adapts its layers, such as lora"
            )


class _Of:
    """The prefix of one layer, as its attention module finds it."""

    def __init__(self, prefixes: AttentionPrefix, layer: int) -> None:
        self.prefixes = prefixes
        self.layer = layer

    def like(self, key: Float[Tensor, "examples heads tokens size"]) -> Float[Tensor, "2 examples heads virtual size"]:
        """Keys and values for as many examples and heads as the text's keys have, in their type."""
        self.prefixes.unused.discard(self.layer)
        made: Tensor = self.prefixes.prompt(self.layer)
        by_head = made.to(key.dtype).view(*made.shape[:2], key.shape[1], key.shape[3]).transpose(1, 2)
        return by_head[:, None].expand(-1, key.shape[0], -1, -1, -1)

    @property
    def config(self) -> Any:
        """The model's own configuration, which names the attention function that is chosen."""
        return self.prefixes.configs[self.layer]

    def bias(self, module: nn.Module, queries: int, past: int) -> Float[Tensor, "1 heads queries virtual"]:
        """The relative position bias of the prefix, which stands before everything; of the first layer's, if shared."""
        own = module if hasattr(module, "relative_attention_bias") else self.prefixes.modules_by_layer[0]
        tokens = self.prefixes.tokens
        bias: Tensor = own.compute_bias(queries, tokens, past_seen_tokens=past + tokens)  # type: ignore[operator]
        return bias


def _attend(
    module: nn.Module,
    query: Float[Tensor, "examples all_heads queries size"],
    key: Float[Tensor, "examples heads tokens size"],
    value: Float[Tensor, "examples heads tokens size"],
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the module's prefix in front of its keys and values; what it returns is the chosen function's."""
    prefix: _Of = module.prefix  # type: ignore[assignment]
    chosen = prefix.config._attn_implementation
    if chosen not in _KNOWN:
        raise UserError(
            f"a prefix works with the attention of {', '.join(_KNOWN)}, not with {chosen}",
            "model.set_attn_implementation('sdpa')",
        )
    keys, values = prefix.like(key)
    queries, known = query.shape[2], key.shape[2]
    if options.get("position_bias") is not None:
        bias = prefix.bias(module, queries, known - queries).to(options["position_bias"].dtype)
        options["position_bias"] = torch.cat([bias, options["position_bias"]], 3)
    if attention_mask is None and chosen == "sdpa" and queries > 1 and _is_causal(module, options):
        # The function would take it for causal from the first key on.
        attention_mask = torch.ones(1, 1, queries, known, dtype=torch.bool, device=query.device).tril(known - queries)
    if attention_mask is not None:
        shape = (*attention_mask.shape[:3], prefix.prefixes.tokens)
        seen = attention_mask.new_ones(shape) if attention_mask.dtype == torch.bool else attention_mask.new_zeros(shape)
        attention_mask = torch.cat([seen, attention_mask], 3)
    attend = _function(module, chosen)
    return attend(module, query, torch.cat([keys, key], 2), torch.cat([values, value], 2), attention_mask, **options)


def _is_causal(module: nn.Module, options: dict[str, Any]) -> bool:
    given = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _function(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function of that name as the module's own code would find it."""
    names = inspect.unwrap(type(module).forward).__globals__
    found: Callable[..., tuple[Tensor, Tensor | None]] = names["ALL_ATTENTION_FUNCTIONS"].get_interface(
        name, names["eager_attention_forward"]
    )
    return found


AttentionInterface.register(_NAME, _attend)
