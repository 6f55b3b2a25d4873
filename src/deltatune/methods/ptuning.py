"""P-tuning: virtual tokens in front of the input, made by a small trained encoder.

Liu et al. 2021, arXiv 2103.10385, section 3.2.   P = MLP(E)  or  MLP(LSTM(E)),   E (virtual tokens, width)

    mlp     Linear(d, h) ── ReLU ── Linear(h, h) ── ReLU ── Linear(h, d)
    lstm    LSTM both ways (d → 2h) ── Linear(2h, 2h) ── ReLU ── Linear(2h, d)

The paper's encoder is the LSTM, PEFT's default the MLP. The virtual tokens all stand in front, as in PEFT. It does not
start at the base: the text sees P from the first step on.

A file holds P, which is all that PEFT reads, and the encoder beside it, so that a loaded adapter can go on training.
PEFT's files hold P alone: they load as `prompt`, which gives the same output and trains P itself.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltatune.methods.contract import CONFIG, Seat, SoftPrompt
from deltatune.methods.encoders import drawn, linear, own_type
from deltatune.methods.prompt import EMBEDDINGS, Prompt
from deltatune.methods.values import at_least_one

ENCODER = "prompt_encoder."
"""How the keys of an encoder begin; PEFT's files have none."""


@dataclass(frozen=True)
class PTuning(SoftPrompt):
    """Trains an encoder that makes the embeddings of virtual tokens in front of the input."""

    virtual_tokens: int = 20
    """Number of virtual tokens."""
    encoder: Literal["mlp", "lstm"] = "mlp"
    """What makes them: three linear layers, or an LSTM both ways and two linear layers."""
    hidden: int | None = None
    """Width h inside the encoder. Left out: that of the embeddings."""
    lstm_layers: int = 2
    """Layers of the LSTM."""

    name: ClassVar[str] = "ptuning"
    title: ClassVar[str] = "P-tuning"
    paper: ClassVar[str] = "arXiv 2103.10385"
    learning_rate: ClassVar[float] = 1e-2
    peft_type: ClassVar[str] = "P_TUNING"
    place: ClassVar[Literal["input", "attention"]] = "input"
    keys: ClassVar[tuple[str, ...]] = (EMBEDDINGS, ENCODER)
    __pydantic_config__ = CONFIG

    def __post_init__(self) -> None:
        at_least_one(
            "ptuning",
            virtual_tokens=self.virtual_tokens,
            hidden=() if self.hidden is None else self.hidden,
            lstm_layers=self.lstm_layers,
        )

    def parameters(self, seat: Seat) -> int:
        """Trained parameters: E and the encoder."""
        d, h = seat.width, self.hidden or seat.width
        linear = sum((inputs + 1) * outputs for inputs, outputs in pairwise(self._widths(seat)))
        if self.encoder == "mlp":
            return self.virtual_tokens * d + linear
        first, others = 2 * 4 * h * (d + h + 2), 2 * 4 * h * (3 * h + 2)  # both ways, four gates, two biases
        return self.virtual_tokens * d + first + (self.lstm_layers - 1) * others + linear

    def stored_parameters(self, seat: Seat) -> int:
        """P beside what trains."""
        return self.parameters(seat) + self.virtual_tokens * seat.width

    def _widths(self, seat: Seat) -> tuple[int, ...]:
        """What the linear layers take and give, from the first to the last."""
        d, h = seat.width, self.hidden or seat.width
        return (d, h, h, d) if self.encoder == "mlp" else (2 * h, 2 * h, d)

    def prompt(
        self, seat: Seat, vocabulary: Float[Tensor, "vocabulary width"] | None, generator: torch.Generator
    ) -> "PromptEncoder":
        """A fresh encoder: E from N(0, 1), the layers as PyTorch begins them."""
        lstm = self.lstm_layers if self.encoder == "lstm" else 0
        return PromptEncoder(self.virtual_tokens, seat.width, self._widths(seat), lstm, generator)

    def stored(self, prompt: nn.Module) -> dict[str, Tensor]:
        """The virtual tokens that the encoder makes, and the encoder."""
        with torch.no_grad():
            made: Tensor = prompt()
        return {EMBEDDINGS: made, **{f"{ENCODER}{name}": tensor for name, tensor in prompt.named_parameters()}}

    def restore(self, prompt: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Copies the encoder, which makes the virtual tokens again."""
        for name, parameter in prompt.named_parameters():
            parameter.copy_(tensors[f"{ENCODER}{name}"])

    def to_peft(self) -> dict[str, Any]:
        """PEFT's PromptEncoderConfig fields."""
        return {
            "encoder_reparameterization_type": self.encoder.upper(),
            "encoder_hidden_size": self.hidden,
            "encoder_num_layers": self.lstm_layers,
            "encoder_dropout": 0.0,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> SoftPrompt:
        """Prompt tuning with as many virtual tokens: PEFT's file has no encoder."""
        return Prompt.from_peft(config)


class PromptEncoder(nn.Module):
    """Makes virtual tokens (virtual tokens, width) from trained vectors; `lstm` is the number of its layers or 0.

    `widths` are those that its linear layers take and give.
    """

    def __init__(self, tokens: int, width: int, widths: tuple[int, ...], lstm: int, generator: torch.Generator) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(tokens, width).normal_(generator=generator))
        self.lstm: nn.LSTM | None = None
        if lstm:
            hidden = widths[0] // 2  # each way
            recurrent = nn.LSTM(width, hidden, lstm, bidirectional=True)
            self.lstm = drawn(recurrent, 1 / math.sqrt(hidden), generator)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [linear(inputs, outputs, generator), nn.ReLU()]
        self.mlp = nn.Sequential(*layers[:-1])

    def forward(self) -> Float[Tensor, "tokens width"]:
        """The virtual tokens."""
        with own_type(self.vectors):
            encoded = self.vectors if self.lstm is None else self.lstm(self.vectors)[0]
            made: Tensor = self.mlp(encoded)
        return made
