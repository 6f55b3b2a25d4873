"""What a method is: a frozen dataclass of hyperparameters that can say, without any weights, what it adds and costs.

Its kind is a small Protocol: a weight delta and a block insert stand over layers (`OverLayers`), a soft prompt adds
virtual tokens, a selection adds nothing. A method fills one of them in one file of its own; registering it (see
`registry.py`) makes it appear on the command line, in comparisons, in the docs and in the conformance tests. A method
derives from its Protocol for the parts that most methods do not need: those have a default here.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from pydantic import ConfigDict
from torch import Tensor, nn

from deltatune.weights import FrozenWeight

Kind = Literal["weight delta", "block insert", "soft prompt", "selection", "mixed"]

Targets = str | tuple[str, ...]
"""Which layers a method adapts: aliases, module names or regular expressions; one, or several."""

CONFIG = ConfigDict(extra="forbid", use_attribute_docstrings=True)
"""How pydantic reads a method's fields from a command line or a file: unknown names refused, docstrings as help."""


@dataclass(frozen=True, slots=True)
class Site:
    """The place of one delta: a frozen weight of the base, known by its shape alone."""

    out: int
    """Output features: rows of W; for an embedding the width of a vector."""
    in_: int
    """Input features: columns of W; for an embedding the size of the vocabulary."""
    path: str = ""
    """Module path in the base."""
    role: str = "other"
    """What the layer does, as the table of roles has it: query, down, …"""
    bias: bool = False
    """Whether the layer has a bias."""
    embedding: bool = False
    begin: str = ""
    """Path of the layer that takes in the feed-forward sub-layer which this one ends; empty where none is known."""


@dataclass(frozen=True, slots=True)
class BaseParameter:
    """A parameter of the base as a selection sees it: by what it is, without its values."""

    names: tuple[str, ...]
    """Its names in the base; a tied one has several. It is saved under the first."""
    words: frozenset[str] = frozenset()
    """What it is: `biases`, `norms`, `embeddings`, its layer's role and the aliases that this role has."""
    block: int | None = None
    """Which block it lies in, counted from the input, a decoder's after its encoder's; None outside of the blocks."""


@runtime_checkable
class Method(Protocol):
    """What every method says of itself."""

    name: ClassVar[str]
    """Its name on the command line and in files."""
    title: ClassVar[str]
    """Its name as the field writes it."""
    kind: ClassVar[Kind]
    paper: ClassVar[str]
    """arXiv id or other source; empty where there is none to name."""
    learning_rate: ClassVar[float]
    """A rate that works on small encoders: where to begin, not a result of tuning."""
    peft_type: ClassVar[str]
    """The type in adapter_config.json: PEFT's own, or `DELTATUNE_…` where PEFT has no such method."""


@runtime_checkable
class Delta(Protocol):
    """The trained module over one frozen weight. A real one is also an `nn.Module`.

    One that trains the layer's bias as well holds it as `bias`; it then stands in for the base's. One that changes
    the bias otherwise has `merged_bias(bias)`: the bias that belongs to the merged weight.
    """

    def merged(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The plain formula: the one weight that gives the adapted output."""

    def __call__(
        self, x: Float[Tensor, "tokens in"], weight: FrozenWeight, bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "tokens out"]:
        """The fast formula: the same output, without forming the merged weight."""


@runtime_checkable
class EmbeddingDelta(Protocol):
    """The trained module over one frozen embedding; W is (width, vocabulary)."""

    def merged(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The plain formula: the one embedding that gives the adapted vectors."""

    def __call__(
        self, ids: Int[Tensor, "*shape"], vectors: Float[Tensor, "*shape out"], weight: FrozenWeight
    ) -> Float[Tensor, "*shape out"]:
        """The adapted vectors from the base's own."""


@runtime_checkable
class Insert(Protocol):
    """The trained module after or beside a sub-layer, over the frozen linear layer that ends it.

    One that stands beside is called with the sub-layer's own input as a fourth argument (tokens, out).
    """

    def added(self, h: Float[Tensor, "tokens out"]) -> Float[Tensor, "tokens out"]:
        """The plain formula: what is added to the sub-layer's output; h is that output or, beside, the input."""

    def __call__(
        self, x: Float[Tensor, "tokens in"], weight: FrozenWeight, bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "tokens out"]:
        """The sub-layer's output with what is inserted; x is the input of the layer that ends it."""


@runtime_checkable
class Observer(Protocol):
    """Looks at one site before training begins: at what happens there on some examples, or at what storing it lost."""

    of: ClassVar[Literal["inputs", "gradients", "losses"]]
    """What it sees: of a batch the input vectors (tokens, in), or the gradient (out, in) of its loss by the weight; or,
    once, the weight as it was before it was stored in fewer bits less the stored one (out, in)."""

    @property
    def done(self) -> bool:
        """Whether it has seen enough."""

    def see(self, seen: Float[Tensor, "rows columns"]) -> None:
        """Is given what there is to see; may keep it."""


@runtime_checkable
class OverLayers(Method, Protocol):
    """A method that adds a module over each layer it targets: what weight deltas and block inserts have in common."""

    targets: Targets
    grows_by: ClassVar[str] = ""
    """The hyperparameter, a count, that makes it larger or smaller, to match methods by; "" where there is none."""
    suffixes: ClassVar[Mapping[str, str]]
    """Key suffix in adapter files → attribute of the delta module that is saved under it."""
    shared_suffixes: ClassVar[Mapping[str, str]] = {}
    """The same for what is shared over the model; such keys have no module path."""
    patterns: ClassVar[Mapping[str, str]] = {}
    """Fields that hold values for single targets → the field that such a value replaces."""
    embeddings: ClassVar[bool] = False
    """Whether it is defined over embeddings, too."""
    detached: ClassVar[frozenset[str]] = frozenset()
    """Parameters of a delta whose gradient is by definition not the derivative: `merged` detaches a part of it."""
    unmergeable: ClassVar[str] = ""
    """Why it cannot be merged into the weight; empty where it can."""

    # What it adds and costs, from shapes alone.

    def check(self, site: Site) -> None:
        """Raises `UserError` where the hyperparameters do not fit the site, with the nearest that would."""

    def check_base(self, fingerprint: str) -> None:
        """Raises `UserError` where what the method brings along was made for another base than that of the mark."""
        return

    def parameters(self, site: Site) -> int:
        """Trained parameters of one site, those that are shared over the model left out."""

    def shared_parameters(self, sites: Sequence[Site]) -> int:
        """Trained parameters that these sites share."""
        return 0

    def stored_parameters(self, sites: Sequence[Site]) -> int:
        """Numbers that an adapter file holds for these sites."""
        return sum(self.parameters(site) for site in sites) + self.shared_parameters(sites)

    def start_distance(self, site: Site) -> float:
        """Root mean square of the entries of W' − W before training, roughly; 0 where training starts at the base.

        Of an insert: that of what it adds, where its input has a root mean square of 1.
        """
        return 0.0

    # What it makes.

    def share(self, sites: Sequence[Site], generator: torch.Generator) -> nn.Module | None:
        """What the deltas of these sites have in common, trained or not; every delta holds it as a submodule."""
        return None

    def delta(
        self, site: Site, weight: FrozenWeight, shared: nn.Module | None, generator: torch.Generator
    ) -> nn.Module:
        """A fresh module for one site."""

    # What it takes from examples, or from the weight before it was stored, before it trains.

    def observer(self, site: Site) -> Observer | None:
        """What is to see them at this site; None where the method begins without any."""
        return None

    def informed(self, modules: Mapping[str, "OverLayers"], observers: Mapping[str, Observer]) -> "OverLayers":
        """The method with the hyperparameters that the examples suggest; `modules` has those of each path so far."""
        return self

    def begin(self, delta: nn.Module, observer: Observer) -> None:
        """Gives a fresh delta the values that the examples suggest."""

    # How it trains.

    def rates(self) -> Mapping[str, float]:
        """Parameter name within a delta → its learning rate as a multiple of the run's; 1 where it is not named."""
        return {}

    def penalty(self, deltas: Mapping[str, nn.Module]) -> Float[Tensor, ""] | None:
        """A term to add to the loss of each optimiser step; None where there is none."""
        return None

    def after_step(self, deltas: Mapping[str, nn.Module], step: int, steps: int) -> None:
        """Is called after optimiser step number `step` (from 1) of `steps`, while the gradients still stand."""
        return  # without it the method would count as abstract

    def settled(self, step: int, steps: int) -> bool:
        """Whether what is trained has its final form after that step; the weights of no other step are kept."""
        return True

    # Its file form.

    def stored(self, site: Site, delta: nn.Module) -> dict[str, Tensor]:
        """The tensors that a file holds of one delta, by suffix."""
        return {suffix: getattr(delta, name) for suffix, name in self.suffixes.items()}

    def stored_shared(self, shared: nn.Module) -> dict[str, Tensor]:
        """The tensors that a file holds of what is shared, by suffix. Loading copies into them."""
        return {suffix: getattr(shared, name) for suffix, name in self.shared_suffixes.items()}

    @property
    def lossless(self) -> bool:
        """Whether what was saved loads to the same bits; if not, to the same output up to rounding."""
        return True

    def restore(self, delta: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Puts tensors as `stored` gave them into a delta. Their names and shapes have been checked."""
        for suffix, tensor in tensors.items():
            getattr(delta, self.suffixes[suffix]).copy_(tensor)

    def portable(self) -> "OverLayers":
        """The method that an adapter file of this one describes, where that is another."""
        return self

    def to_peft(self, modules: Mapping[str, Any], deltas: Mapping[str, nn.Module]) -> dict[str, Any]:
        """The method's fields of adapter_config.json; `modules` has the hyperparameters of each adapted path."""

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Whether an adapter_config.json describes this method."""
        return bool(config.get("peft_type") == cls.peft_type)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "OverLayers":
        """The method that an adapter_config.json describes; raises `UserError` on what we cannot honour."""


class WeightDelta(OverLayers, Protocol):
    """A method whose modules change a frozen weight: each fulfils `Delta`, or `EmbeddingDelta` over an embedding."""

    kind: ClassVar[Kind] = "weight delta"


@runtime_checkable
class BlockInsert(OverLayers, Protocol):
    """A method whose modules act on what a sub-layer gives, found by the layer that ends it: each fulfils `Insert`."""

    leave_out: tuple[int, ...]
    """Numbers of the model's blocks that get no module, counted from 0; a decoder's follow its encoder's."""
    beside: ClassVar[bool] = False
    """Whether its modules read what goes into the sub-layer; what comes out of it otherwise."""
    kind: ClassVar[Kind] = "block insert"
    unmergeable: ClassVar[str] = "it is not linear in the layer's input, so no weight gives the same output"


@dataclass(frozen=True, slots=True)
class Seat:
    """The place of a soft prompt in a model: its sizes alone."""

    width: int
    """Features of an input embedding; for a prefix, of what enters an attention layer."""
    vocabulary: int = 0
    """Rows of the input embedding; 0 for a prefix."""
    keys: tuple[int, ...] = ()
    """For a prefix: features of the keys of each attention layer, over all their heads. The values have as many."""


@runtime_checkable
class SoftPrompt(Method, Protocol):
    """A method that adds virtual tokens: at the input, or as keys and values of every attention layer.

    The base sees them in front of each text; what it gives for them is cut off, so that a classifier pools real tokens
    and they carry no loss.
    """

    kind: ClassVar[Kind] = "soft prompt"
    unmergeable: ClassVar[str] = "it adds virtual tokens, and no weight gives the same output"
    virtual_tokens: int
    """How many; each takes a position of the model's."""
    place: ClassVar[Literal["input", "attention"]]
    grows_by: ClassVar[str] = "virtual_tokens"
    """As of a method over layers."""
    keys: ClassVar[tuple[str, ...]]
    """Keys in adapter files, or their beginnings; all start with `prompt_`."""

    def parameters(self, seat: Seat) -> int:
        """Trained parameters."""

    def stored_parameters(self, seat: Seat) -> int:
        """Numbers that an adapter file holds."""
        return self.parameters(seat)

    def prompt(
        self, seat: Seat, vocabulary: Float[Tensor, "vocabulary width"] | None, generator: torch.Generator
    ) -> nn.Module:
        """A fresh module; `vocabulary` has the input embeddings, None where they have no values yet, or for a prefix.

        At the input, called without arguments, it gives the virtual tokens (virtual_tokens, width); in attention, with
        the number of a layer, that layer's keys and values (2, virtual_tokens, keys).
        """

    def tokenised(self, encode: Callable[[str], list[int]]) -> "SoftPrompt":
        """The method with the token ids of the texts that it has."""
        return self

    # Its file form.

    def stored(self, prompt: nn.Module) -> dict[str, Tensor]:
        """The tensors that a file holds, by key: `prompt_embeddings`, as PEFT has it, and what else it trains."""

    def restore(self, prompt: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Puts tensors as `stored` gave them into a prompt. Their names and shapes have been checked."""

    def to_peft(self) -> dict[str, Any]:
        """The method's own fields of adapter_config.json, beside those that every soft prompt has."""

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Whether an adapter_config.json describes this method."""
        return bool(config.get("peft_type") == cls.peft_type)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "SoftPrompt":
        """The method that goes on training what PEFT's file holds: the resulting prompt, never what made it."""


@runtime_checkable
class Selection(Method, Protocol):
    """A method that adds nothing: it names parameters of the base that train.

    What is kept for backward is the base's own and follows from which of its weights train, not from the method.
    """

    def select(self, parameters: Sequence[BaseParameter]) -> Collection[BaseParameter]:
        """Those of the base's parameters that train; the head, which is not among them, always does.

        Raises `UserError` where a hyperparameter names none, or more than there are.
        """
