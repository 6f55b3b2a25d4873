"""Where a soft prompt goes: the module that takes the tokens, and the attention of each of its blocks."""

import inspect
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltatune.errors import UserError
from deltatune.methods import Seat, SoftPrompt
from deltatune.models.adapted import Adapted
from deltatune.models.positions import room_for_text
from deltatune.models.roles import linear_roles
from deltatune.weights import is_linear, weight_of


@dataclass(frozen=True)
class Attention:
    """The self-attention of one block."""

    path: str
    inputs: int
    """Features of what enters it."""
    keys: int
    """Features of its keys, over all heads."""


@dataclass(frozen=True)
class Stack:
    """The part of a model that a soft prompt acts on, from embedded tokens to hidden states."""

    path: str
    """In the model; empty for the model itself."""
    module: PreTrainedModel
    order: tuple[str, ...]
    """The names of what it can be called with."""
    reader: str | None = None
    """For an encoder's stack: the path of the decoder that reads what it gives."""
    attentions: tuple[Attention, ...] = ()
    """For a prefix: the self-attention of every block."""


@dataclass(frozen=True)
class Call:
    """One call of a stack as it came, before virtual tokens are added."""

    arguments: dict[str, Any]
    """By name."""
    examples: int
    length: int
    """Tokens that are given now."""
    cached: int
    """Tokens whose keys and values are in the cache that is given."""
    device: torch.device


def read_call(stack: Stack, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The arguments of a call by name, and its sizes. Raises `UserError` for a cache of fixed size."""
    arguments = {**dict(zip(stack.order, args, strict=False)), **kwargs}
    tokens = arguments.get("input_ids")
    tokens = arguments["inputs_embeds"] if tokens is None else tokens
    cache = arguments.get("past_key_values")
    if getattr(cache, "is_compileable", False):
        raise UserError(
            "a cache of fixed size has no room for virtual tokens", "generate without cache_implementation=static"
        )
    cached = 0 if cache is None else int(cache.get_seq_length())
    return Call(arguments, tokens.shape[0], tokens.shape[1], cached, tokens.device)


def find_stack(model: nn.Module, method: SoftPrompt) -> tuple[Stack, Seat]:
    """The stack that the method acts on and its sizes, from shapes alone.

    That is the base model; in an encoder–decoder the encoder at the input, and the decoder in attention. Raises
    `UserError` for one that takes no embedded tokens, or whose attention does not go through Transformers' interface,
    and for more virtual tokens than it has positions for.
    """
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"{method.name} needs a model of Transformers, not a {type(model).__name__}")
    encoder, decoder = _halves(model)
    chosen = encoder if method.place == "input" else decoder
    parameters = inspect.signature(type(chosen).forward).parameters
    path = next(path for path, module in model.named_modules() if module is chosen)
    reader = next((path for path, module in model.named_modules() if module is decoder is not encoder), None)
    order = tuple(parameters)[1:]  # without self
    stack = Stack(path, cast(PreTrainedModel, chosen), order)
    room_for_text(stack.module.config, method.virtual_tokens)
    if method.place == "attention":
        return _in_attention(model, stack)
    if reader is None and model.can_generate() and "past_key_values" not in order:
        raise UserError(
            f"{type(chosen).__name__} generates without a cache of keys and values, where virtual tokens could stay",
            "use a method that adapts its layers, such as lora",
        )
    return _at_input(stack, reader)


def _halves(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The encoder and the decoder of a model that has both; twice the base model of another."""
    base = model.base_model
    if not getattr(model.config, "is_encoder_decoder", False):
        return base, base
    encoder, decoder = model.get_encoder(), model.get_decoder()
    whole = (model, base)
    return (base, base) if encoder in whole or decoder in whole else (encoder, decoder)


def _at_input(stack: Stack, reader: str | None) -> tuple[Stack, Seat]:
    name = type(stack.module).__name__
    try:
        embeddings = stack.module.get_input_embeddings()
    except NotImplementedError:
        embeddings = None
    weight = getattr(embeddings, "weight", None)
    if not {"input_ids", "inputs_embeds"} <= set(stack.order) or not isinstance(weight, Tensor) or weight.ndim != 2:
        raise UserError(
            f"{name} takes no embedded tokens (inputs_embeds), so nothing can stand in front of them",
            "use a method that adapts its layers, such as lora, or prefix",
        )
    pooler = getattr(stack.module, "pooler", None)
    if pooler is not None and is_linear(pooler.base if isinstance(pooler, Adapted) else pooler):
        raise UserError(
            f"{name} pools its first position by itself, which would be a virtual token",
            "use a method that adapts its layers, such as lora, or prefix",
        )
    return Stack(stack.path, stack.module, stack.order, reader), Seat(weight.shape[1], weight.shape[0])


def _in_attention(model: PreTrainedModel, stack: Stack) -> tuple[Stack, Seat]:
    """The first attention of every block: what follows in a block attends to an encoder."""
    name, inside = type(stack.module).__name__, f"{stack.path}." if stack.path else ""
    if getattr(stack.module.config, "max_position_embeddings", None) and "position_ids" not in stack.order:
        raise UserError(f"{name} counts positions by itself: they cannot be moved behind a prefix", _INSTEAD)
    found: dict[str, Attention] = {}
    roles = {path: role for path, role in linear_roles(model).items() if path.startswith(inside)}
    for path, role in roles.items():
        block = _block(path.removeprefix(inside))
        if role in ("key", "qkv") and block is not None and block not in found:
            found[block] = _attention(model, path, role, roles)
    lists = {block.rpartition(".")[0] for block in found}
    every = [f"{path}.{i}" for path in lists for i in range(len(cast(nn.ModuleList, stack.module.get_submodule(path))))]
    lacking = [block for block in every if block not in found]
    if lacking or not found:
        which = f"the attention of its block {lacking[0]}" if lacking else "its attention"
        raise UserError(f"in {name} nothing is known to make keys and values in {which}", _INSTEAD)
    for attention in found.values():
        _goes_through_interface(model.get_submodule(attention.path))
    attentions = tuple(found.values())
    seat = Seat(attentions[0].inputs, keys=tuple(attention.keys for attention in attentions))
    return Stack(stack.path, stack.module, stack.order, None, attentions), seat


_INSTEAD = "use a method that adapts its layers, such as lora, or prompt"


def _block(path: str) -> str | None:
    """The path of the block that a module is in: up to the first number."""
    parts = path.split(".")
    places = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: places[0] + 1]) if places else None


def _attention(model: nn.Module, path: str, role: str, roles: dict[str, Any]) -> Attention:
    """The attention that a layer for keys belongs to; of one for queries, keys and values the queries are taken off."""
    parent = path.rpartition(".")[0]
    out, inputs = _shape(model, path)
    if role == "key":
        values = next((p for p, r in roles.items() if r == "value" and p.startswith(f"{parent}.")), path)
        if _shape(model, values)[0] != out:
            raise UserError(f"{parent} has keys and values of different widths, which a prefix cannot have", _INSTEAD)
        return Attention(parent, inputs, out)
    outputs = [p for p, r in roles.items() if r == "attention-output" and p.startswith(f"{parent}.")]
    if not outputs:
        raise UserError(f"{parent} does not tell queries, keys and values apart", _INSTEAD)
    queries = _shape(model, outputs[0])[1]
    return Attention(parent, inputs, (out - queries) // 2)


def _shape(model: nn.Module, path: str) -> tuple[int, int]:
    layer = model.get_submodule(path)
    if isinstance(layer, Adapted):
        return layer.site.out, layer.site.in_
    weight = weight_of(layer)
    return weight.out, weight.in_


def _goes_through_interface(module: nn.Module) -> None:
    forward = inspect.unwrap(type(module).forward)
    names = {"ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"}
    if not names <= set(forward.__code__.co_names) or not hasattr(module, "config"):
        raise UserError(
            f"the attention of {type(module).__name__} does not go through Transformers' attention interface", _INSTEAD
        )
