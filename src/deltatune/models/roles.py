"""What each linear layer of an architecture does, told by its name; by its shape where the name is not known.

The table is the one place that knows architectures. It holds the ends of module paths, so that a new model whose
layers carry usual names needs no entry of its own. The longest end that fits wins.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal, TypeVar

from torch import nn
from transformers import PreTrainedModel

from deltatune.models.adapted import Adapted, Added
from deltatune.weights import is_linear, weight_of

Role = Literal[
    "query", "key", "value", "qkv", "attention-output", "attention", "gate", "up", "down", "pooler", "other",
    "token-embedding", "embedding",
]  # fmt: skip

_ENDS: Mapping[Role, str] = {
    # the end of the path                                                        seen in
    "query": """
        attention.self.query attention.attention.query                           BERT, RoBERTa, ELECTRA; ViT
        attention.self.query_proj                                                DeBERTa-v2
        attention.q_lin                                                          DistilBERT
        attention.query                                                          ALBERT
        q_proj                                                                   Llama, Qwen, Mistral, Gemma, OPT, BART
        SelfAttention.q EncDecAttention.q                                        T5
    """,
    "key": """
        attention.self.key attention.attention.key attention.self.key_proj
        attention.k_lin attention.key k_proj SelfAttention.k EncDecAttention.k
    """,
    "value": """
        attention.self.value attention.attention.value attention.self.value_proj
        attention.v_lin attention.value v_proj SelfAttention.v EncDecAttention.v
    """,
    "qkv": """
        attn.c_attn                                                              GPT-2
        attn.Wqkv                                                                ModernBERT
        qkv_proj                                                                 Phi-3
        query_key_value                                                          GPT-NeoX, Falcon, BLOOM
    """,
    "attention-output": """
        attention.output.dense attention.out_lin attention.dense                 BERT, ViT; DistilBERT; ALBERT, GPT-NeoX
        self_attention.dense                                                     Falcon, BLOOM
        attn.c_proj attn.Wo o_proj self_attn.out_proj encoder_attn.out_proj      GPT-2; ModernBERT; Llama …; OPT, BART
        SelfAttention.o EncDecAttention.o                                        T5
    """,
    "gate": """
        gate_proj gate_up_proj mlp.Wi                                            Llama …; Phi-3, ModernBERT: with up
        DenseReluDense.wi_0                                                      T5 v1.1, FLAN-T5
    """,
    "up": """
        intermediate.dense ffn.lin1 ffn mlp.c_fc                                 BERT, ViT; DistilBERT; ALBERT; GPT-2
        up_proj fc1 mlp.dense_h_to_4h                                            Llama …; OPT, BART; GPT-NeoX, BLOOM
        DenseReluDense.wi DenseReluDense.wi_1                                    T5; T5 v1.1
    """,
    "down": """
        output.dense ffn.lin2 ffn_output mlp.c_proj mlp.Wo down_proj fc2
        mlp.dense_4h_to_h DenseReluDense.wo
    """,
    "pooler": "pooler.dense pooler                                               BERT; ALBERT",
}
_BY_END: dict[str, Role] = {
    end: role
    for role, rows in _ENDS.items()
    for row in rows.splitlines()
    for end in re.split(r"\s{3,}", row.strip())[0].split()
}

ALIASES: Mapping[str, frozenset[Role]] = {
    "attention": frozenset({"query", "key", "value", "qkv", "attention-output", "attention"}),
    "attention-qv": frozenset({"query", "value", "qkv"}),
    "attention-kv": frozenset({"key", "value", "qkv"}),
    "attention-output": frozenset({"attention-output"}),
    "mlp": frozenset({"gate", "up", "down"}),
    "mlp-down": frozenset({"down"}),
    "embeddings": frozenset({"token-embedding"}),
}
"""Words for several roles at once. `all-linear`, every linear layer outside of the head, stands for itself."""

EMBEDDINGS: frozenset[Role] = frozenset({"token-embedding", "embedding"})
"""The roles of embeddings; `all-linear` has none of them."""


Model = TypeVar("Model", bound=nn.Module)
Found = TypeVar("Found")
_kept: dict[nn.Module, dict[Any, Any]] = {}


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Within the block nothing is put on the model or taken from it, so what a `survey` finds of it is found once."""
    _kept[model] = {}
    try:
        yield
    finally:
        del _kept[model]


def survey(find: Callable[[Model], Found]) -> Callable[[Model], Found]:
    """A function that goes through a model's modules; see `unchanged`. What it gives is not to be written to."""

    @wraps(find)
    def found(model: Model) -> Found:
        kept = _kept.get(model)
        if kept is None:
            return find(model)
        if find not in kept:
            kept[find] = find(model)
        answer: Found = kept[find]
        return answer

    return found


@survey
def linear_roles(model: nn.Module) -> dict[str, Role]:
    """The role of each linear layer of `model`, by module path, in the model's order."""
    return {path: _role(path, layer) for path, layer in base_layers(model) if is_linear(layer)}


@survey
def embedding_roles(model: nn.Module) -> dict[str, Role]:
    """The role of each plain embedding of `model`, by module path: that of its input tokens, or another.

    T5 and its kin name an embedding in which nothing is looked up, the encoder's and decoder's being tied to it: that
    one is left out.
    """
    every = {path: layer for path, layer in base_layers(model) if isinstance(layer, nn.Embedding)}
    tokens = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    tokens = tokens.base if isinstance(tokens, Adapted) else tokens
    tied = {path for path, layer in every.items() if tokens is not None and layer.weight is tokens.weight}
    unused = {path for path in tied if every[path] is tokens and len(tied) > 1}
    return {
        path: "token-embedding" if path in tied else "embedding"
        for path, layer in every.items()
        if type(layer) is nn.Embedding and path not in unused  # a class of its own may do more than look vectors up
    }


@survey
def base_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of the base by path, as if nothing were attached."""
    return list(_base_layers(model))


def _base_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside: list[str] = []  # of adapted layers: their base and deltas, which are no modules of the base
    for path, module in model.named_modules():
        if isinstance(module, Adapted):
            inside.append(f"{path}.")
            yield path, module.base
        elif isinstance(module, Added):
            inside.append(f"{path}.")
        elif not path.startswith(tuple(inside)):
            yield path, module


def _role(path: str, module: nn.Module) -> Role:
    parts = path.split(".")
    for start in range(len(parts)):
        if role := _BY_END.get(".".join(parts[start:])):
            return role
    if not any(part.isdecimal() for part in parts):  # not in a stack of blocks
        return "other"
    weight = weight_of(module)
    if "att" in path.lower():
        return "attention"
    if weight.out >= 2 * weight.in_:
        return "up"
    return "down" if weight.in_ >= 2 * weight.out else "attention"
