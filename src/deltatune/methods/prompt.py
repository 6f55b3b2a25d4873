"""Prompt tuning: virtual tokens in front of the input, whose embeddings train.

Lester et al. 2021, arXiv 2104.08691, section 2.

    [P; X]  (virtual tokens + tokens, width)  ──▶  frozen model  ──▶  what it gives for X

P begins as the embeddings of random words of the vocabulary, of a given text, or as noise of their size (section 3.2).
It does not start at the base: the text sees P from the first step on. A classifier pools the text's own tokens, where
PEFT's can pool a virtual one. In an encoder–decoder P stands before the encoder's input, and the decoder attends to it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltatune.errors import UserError
from deltatune.methods.contract import CONFIG, Seat, SoftPrompt
from deltatune.methods.values import at_least_one, whole

EMBEDDINGS = "prompt_embeddings"
"""The key of the virtual tokens in PEFT's files."""


@dataclass(frozen=True)
class Prompt(SoftPrompt):
    """Trains the embeddings of virtual tokens in front of the input."""

    virtual_tokens: int = 20
    """Number of virtual tokens."""
    init: Literal["vocabulary", "text", "noise"] = "vocabulary"
    """What they begin as: random rows of the vocabulary, the words of `text`, or noise of the vocabulary's size."""
    text: str = ""
    """With init=text: the words to begin with, cut off or repeated to as many tokens as there are."""
    token_ids: tuple[int, ...] = ()
    """The tokens of `text`, without special ones. Training fills them in; `attach` alone has no tokenizer."""

    name: ClassVar[str] = "prompt"
    title: ClassVar[str] = "Prompt tuning"
    paper: ClassVar[str] = "arXiv 2104.08691"
    learning_rate: ClassVar[float] = 1e-1
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    place: ClassVar[Literal["input", "attention"]] = "input"
    keys: ClassVar[tuple[str, ...]] = (EMBEDDINGS,)
    __pydantic_config__ = CONFIG

    def __post_init__(self) -> None:
        at_least_one("prompt", virtual_tokens=self.virtual_tokens)
        if self.init == "text" and not (self.text.strip() or self.token_ids):
            raise UserError("prompt: init=text needs a text", "give one, such as text='Is this review good or bad?'")
        if self.init != "text" and (self.text or self.token_ids):
            raise UserError(f"prompt: init={self.init} uses no text", "give init=text with it")

    def parameters(self, seat: Seat) -> int:
        """Trained parameters: L·d."""
        return self.virtual_tokens * seat.width

    def tokenised(self, encode: Callable[[str], list[int]]) -> "Prompt":
        """The method with the token ids of its text."""
        if self.init != "text" or self.token_ids:
            return self
        return replace(self, token_ids=tuple(encode(self.text)))

    def prompt(
        self, seat: Seat, vocabulary: Float[Tensor, "vocabulary width"] | None, generator: torch.Generator
    ) -> "PromptEmbeddings":
        """Fresh virtual tokens. Raises `UserError` for a text without token ids, or with ids that are none."""
        start = torch.zeros(self.virtual_tokens, seat.width)
        if self.init == "text" and not self.token_ids:
            raise UserError(
                f"prompt: the text '{self.text}' has no token ids yet",
                "give token_ids=tokenizer(text, add_special_tokens=False)['input_ids']; deltatune.tune does so itself",
            )
        strange = [i for i in self.token_ids if not 0 <= i < seat.vocabulary]
        if strange:
            raise UserError(
                f"prompt: {strange[0]} is no token of a vocabulary of {seat.vocabulary}", "use the base's own tokenizer"
            )
        if vocabulary is None:
            return PromptEmbeddings(start)
        if self.init == "noise":
            size = vocabulary.float().std().item()
            return PromptEmbeddings(start.normal_(0, size, generator=generator))
        ids = torch.randint(seat.vocabulary, (self.virtual_tokens,), generator=generator)
        if self.init == "text":
            ids = torch.tensor(list(islice(cycle(self.token_ids), self.virtual_tokens)))
        return PromptEmbeddings(vocabulary[ids.to(vocabulary.device)].float().clone())

    def stored(self, prompt: nn.Module) -> dict[str, Tensor]:
        """The virtual tokens."""
        assert isinstance(prompt, PromptEmbeddings)
        return {EMBEDDINGS: prompt.embeddings}

    def restore(self, prompt: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Copies the virtual tokens."""
        assert isinstance(prompt, PromptEmbeddings)
        prompt.embeddings.copy_(tensors[EMBEDDINGS])

    def to_peft(self) -> dict[str, Any]:
        """PEFT's PromptTuningConfig fields; the text that it began with needs a tokenizer there, so it is left out."""
        return {"prompt_tuning_init": "RANDOM"}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "Prompt":
        """Reads PEFT's PromptTuningConfig fields."""
        return cls(virtual_tokens=whole("prompt tuning", config, "num_virtual_tokens"))


class PromptEmbeddings(nn.Module):
    """Virtual tokens that train as they are: (virtual tokens, width)."""

    def __init__(self, start: Float[Tensor, "tokens width"]) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(start)

    def forward(self) -> Float[Tensor, "tokens width"]:
        """The virtual tokens."""
        return self.embeddings
