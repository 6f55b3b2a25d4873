"""New tokens: the vocabulary of a language model grows by words that stand for something of their own, such as <tool>.

Their vectors are a module of their own, `new_tokens`, which is a head: it trains with every method, alone (`head`) or
beside one, and is saved with it. The base's weights only grow, and what stood in them is never written to. Where the
output layer is the embedding, a token has one vector for both.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltatune.errors import UserError
from deltatune.models.roles import base_layers, embedding_roles

NEW_TOKENS = "new_tokens"
"""The path of the module in a model."""
IN_FILES = ".token_adapter.trainable_tokens_delta"
"""What an adapter file has behind the path of an embedding or output layer for the vectors of new tokens, as PEFT."""


class NewTokens(nn.Module):
    """The vectors of tokens that a base did not have; they begin at the mean of those that it has."""

    def __init__(
        self,
        ids: Sequence[int],
        texts: Sequence[str],
        before: int,
        inputs: Float[Tensor, " width"],
        outputs: Float[Tensor, " width"] | None,
    ) -> None:
        super().__init__()
        self.texts = tuple(texts)
        """As many as ids; none where they are not known."""
        self.before = before
        """The rows that the base's embedding has."""
        self.inputs = nn.Parameter(inputs.repeat(len(ids), 1))  # (tokens, width)
        self.outputs = None if outputs is None else nn.Parameter(outputs.repeat(len(ids), 1))
        """Those of an output layer that is not the embedding."""
        self.ids: Tensor
        self.register_buffer("ids", torch.tensor(ids, device=inputs.device), persistent=False)

    def looked_up(
        self, layer: nn.Module, args: tuple[Int[Tensor, "*shape"]], vectors: Float[Tensor, "*shape width"]
    ) -> Float[Tensor, "*shape width"]:
        """What an embedding gives, with the vectors of new tokens in their places: a hook on it."""
        found = args[0][..., None] == self.ids
        own = self.inputs[found.int().argmax(-1)].to(vectors.dtype)
        return torch.where(found.any(-1, keepdim=True), own, vectors)

    def scored(
        self, layer: nn.Module, args: tuple[Float[Tensor, "*shape width"]], logits: Float[Tensor, "*shape vocabulary"]
    ) -> Float[Tensor, "*shape vocabulary"]:
        """What the output layer gives, with the logits of new tokens in their places: a hook on it."""
        rows = self.inputs if self.outputs is None else self.outputs
        bias = cast(Tensor | None, getattr(layer, "bias", None))
        own = F.linear(args[0], rows.to(args[0].dtype), None if bias is None else bias[self.ids])
        return logits.index_copy(-1, self.ids, own.to(logits.dtype))


@torch.no_grad()
def grow(model: PreTrainedModel, ids: Sequence[int], texts: Sequence[str] = ()) -> PreTrainedModel:
    """Gives a language model new tokens of these ids, in place; nothing changes where it has them.

    Raises `UserError` where it has others, or an embedding that does more than look vectors up.
    """
    if refuse_others(model, ids):
        there = cast(NewTokens, new_tokens(model))
        there.texts = there.texts or tuple(texts)
        return model
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or not isinstance(output, nn.Linear):
        raise UserError(
            f"{type(model).__name__} cannot take new tokens: its embedding is a {type(embedding).__name__}",
            "use a base with an ordinary embedding, such as Llama, Qwen2, GPT-2 or T5",
        )
    tied, before = output.weight is embedding.weight, embedding.num_embeddings
    output_weight = output.weight
    mean, other = embedding.weight.float().mean(0), None if tied else output.weight.float().mean(0)
    if max(ids) >= before:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        model.get_input_embeddings().weight[before:] = mean
        if other is not None:  # written anew: T5's configurations say that it is tied, whatever the weights
            rows = other.to(output.weight.dtype).expand(max(ids) + 1 - before, -1)
            model.get_output_embeddings().weight = nn.Parameter(torch.cat([output_weight, rows]))
    new = NewTokens(ids, texts, before, mean, other)
    model.add_module(NEW_TOKENS, new)
    for path, role in embedding_roles(model).items():
        if role == "token-embedding":
            model.get_submodule(path).register_forward_hook(new.looked_up)
    model.get_output_embeddings().register_forward_hook(new.scored)
    return model


def new_tokens(model: nn.Module) -> NewTokens | None:
    """The tokens that were added to the model; None where there are none."""
    found = getattr(model, NEW_TOKENS, None)
    return found if isinstance(found, NewTokens) else None


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Writes the vectors of new tokens into the model's own weights, for good: it is an ordinary model again."""
    new = new_tokens(model)
    if new is None:
        return
    for _, layer in base_layers(model):
        hooks = layer._forward_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is new]:
            del hooks[key]
    own = cast(PreTrainedModel, model)
    own.get_input_embeddings().weight[new.ids] = new.inputs.to(own.get_input_embeddings().weight.dtype)
    if new.outputs is not None:
        output = own.get_output_embeddings()
        output.weight[new.ids] = new.outputs.to(output.weight.dtype)
    delattr(model, NEW_TOKENS)


def names_in_files(model: nn.Module) -> dict[str, str]:
    """What the parameters of new tokens are called in adapter files, by their names in the model."""
    new = new_tokens(model)
    if new is None:
        return {}
    own = cast(PreTrainedModel, model)
    layers = {"inputs": own.get_input_embeddings(), "outputs": own.get_output_embeddings()}
    paths = {name: next(path for path, one in base_layers(model) if one is layer) for name, layer in layers.items()}
    return {f"{NEW_TOKENS}.{name}": f"{paths[name]}{IN_FILES}" for name, _ in new.named_parameters()}


def refuse_others(model: nn.Module, ids: Sequence[int]) -> bool:
    """Whether the model has these new tokens already; raises `UserError` where it has others."""
    there = new_tokens(model)
    if there is None:
        return False
    if there.ids.tolist() != list(ids):
        named = ", ".join(there.texts) or f"ids {there.ids.tolist()}"
        raise UserError(f"this base has other new tokens already: {named}", "load the base again to add others")
    return True
