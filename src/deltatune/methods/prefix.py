"""Prefix tuning: trained keys and values in front of those of the text, in every attention layer.

Li and Liang 2021, arXiv 2101.00190, section 4.2.   attention(Q, [Pₖ; K], [Pᵥ; V])

    direct        P trains as it is: Pₖ and Pᵥ (virtual tokens, d_kv) of each layer
    projected     [Pₖ; Pᵥ] of all layers = Linear(tanh(Linear(E))),  E (virtual tokens, width): section 4.3

d_kv is the width of all heads' keys: of those that queries share, in grouped-query attention. The keys get no rotary
embedding, and the text's positions come after the virtual ones, as in PEFT. In an encoder–decoder the prefix is in the
decoder's self-attention, as in PEFT; the paper has it in the encoder too. It does not start at the base: a share of the
attention goes to the prefix from the first step on.

A file holds P, which is all that PEFT reads, and the projection beside it, so that a loaded adapter can go on training.
PEFT's files hold P alone: they load as a direct prefix. In an encoder–decoder PEFT gives two layers one prefix, so that
it cannot have ours; its own load here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltatune.methods.contract import CONFIG, Seat, SoftPrompt
from deltatune.methods.encoders import linear, own_type
from deltatune.methods.prompt import EMBEDDINGS
from deltatune.methods.ptuning import ENCODER
from deltatune.methods.values import at_least_one, whole


@dataclass(frozen=True)
class Prefix(SoftPrompt):
    """Trains keys and values that stand before those of the text in every attention layer."""

    virtual_tokens: int = 20
    """Number of virtual tokens."""
    projection: bool = False
    """Whether a small network makes the keys and values of all layers from trained vectors."""
    hidden: int = 512
    """Width of the network's middle layer."""

    name: ClassVar[str] = "prefix"
    title: ClassVar[str] = "Prefix tuning"
    paper: ClassVar[str] = "arXiv 2101.00190"
    learning_rate: ClassVar[float] = 3e-2
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    place: ClassVar[Literal["input", "attention"]] = "attention"
    keys: ClassVar[tuple[str, ...]] = (EMBEDDINGS, ENCODER)
    __pydantic_config__ = CONFIG

    def __post_init__(self) -> None:
        at_least_one("prefix", virtual_tokens=self.virtual_tokens, hidden=self.hidden)

    def parameters(self, seat: Seat) -> int:
        """Trained parameters: the keys and values themselves, or the network."""
        features = 2 * sum(seat.keys)
        if not self.projection:
            return self.virtual_tokens * features
        return self.virtual_tokens * seat.width + (seat.width + 1) * self.hidden + (self.hidden + 1) * features

    def stored_parameters(self, seat: Seat) -> int:
        """The keys and values, and the network where there is one."""
        made = self.virtual_tokens * 2 * sum(seat.keys)
        return made + self.parameters(seat) if self.projection else made

    def prompt(
        self, seat: Seat, vocabulary: Float[Tensor, "vocabulary width"] | None, generator: torch.Generator
    ) -> nn.Module:
        """A fresh prefix: from N(0, 1) as PEFT's, or a network as PyTorch begins it over vectors from N(0, 1)."""
        if self.projection:
            return ProjectedPrefix(self.virtual_tokens, seat, self.hidden, generator)
        return DirectPrefix(self.virtual_tokens, seat.keys, generator)

    def stored(self, prompt: nn.Module) -> dict[str, Tensor]:
        """The keys and values of all layers side by side, and the network where there is one."""
        assert isinstance(prompt, DirectPrefix | ProjectedPrefix)
        with torch.no_grad():
            made = torch.cat([prompt.flat(layer) for layer in range(len(prompt.layers))], 1)
        network = prompt.named_parameters() if self.projection else ()
        return {EMBEDDINGS: made, **{f"{ENCODER}{name}": tensor for name, tensor in network}}

    def restore(self, prompt: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Copies the keys and values into their layers, or the network, which makes them again."""
        if isinstance(prompt, DirectPrefix):
            widths = [layer.shape[1] for layer in prompt.layers]
            for layer, values in zip(prompt.layers, torch.split(tensors[EMBEDDINGS], widths, 1), strict=True):
                layer.copy_(values)
            return
        for name, parameter in prompt.named_parameters():
            parameter.copy_(tensors[f"{ENCODER}{name}"])

    def to_peft(self) -> dict[str, Any]:
        """PEFT's PrefixTuningConfig fields; what is in `prompt_embeddings` is the prefix itself."""
        return {"prefix_projection": False, "encoder_hidden_size": self.hidden, "init_weights": None}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "Prefix":
        """Reads PEFT's PrefixTuningConfig fields."""
        return cls(virtual_tokens=whole("prefix tuning", config, "num_virtual_tokens"))


class DirectPrefix(nn.Module):
    """Keys and values that train as they are."""

    def __init__(self, tokens: int, keys: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.layers = nn.ParameterList(torch.empty(tokens, 2 * d).normal_(generator=generator) for d in keys)

    def flat(self, layer: int) -> Float[Tensor, "tokens features"]:
        """A layer's keys and values side by side: features are 2·d_kv."""
        kept: Tensor = self.layers[layer]
        return kept

    def forward(self, layer: int) -> Float[Tensor, "2 tokens keys"]:
        """A layer's keys and its values."""
        return torch.stack(self.flat(layer).chunk(2, 1))


class ProjectedPrefix(nn.Module):
    """Keys and values that a network makes; each layer's own rows of the last matrix are a layer of their own."""

    def __init__(self, tokens: int, seat: Seat, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(tokens, seat.width).normal_(generator=generator))
        self.middle = linear(seat.width, hidden, generator)
        self.layers = nn.ModuleList(linear(hidden, 2 * d, generator) for d in seat.keys)

    def flat(self, layer: int) -> Float[Tensor, "tokens features"]:
        """A layer's keys and values side by side: features are 2·d_kv.

        The small middle layer is computed again for each: nothing has to be kept from one layer to the next, so that
        checkpointing works.
        """
        with own_type(self.vectors):
            made: Tensor = self.layers[layer](torch.tanh(self.middle(self.vectors)))
        return made

    def forward(self, layer: int) -> Float[Tensor, "2 tokens keys"]:
        """A layer's keys and its values."""
        return torch.stack(self.flat(layer).chunk(2, 1))
