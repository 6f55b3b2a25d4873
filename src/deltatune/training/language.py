"""Learning to write: cross-entropy of the scored tokens alone, never with all logits at once.

The logits of a batch are its largest tensor: tokens × vocabulary, several times over in the loss and its gradient. The
model is stopped where its output layer would begin. Of what would enter there only the rows of scored tokens go on, a
few at a time: the logits of these, their loss and its gradient exist together and are gone before the next ones come.
"""

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from deltatune.data.batches import ROWS, Batch, by_length, collate_sequences
from deltatune.data.dialogues import Dialogues
from deltatune.data.encode import encode, references
from deltatune.data.sequences import UNSCORED, Sequences
from deltatune.models.base import Base
from deltatune.scoring import score_texts
from deltatune.training.cross_entropy import cross_entropy_
from deltatune.training.generation import Decoding, generate, prompts_before_answers
from deltatune.training.modes import SCORED_TOKENS, evaluating
from deltatune.training.packing import Packing, find_packing, length_step
from deltatune.training.precision import Computed, autocast
from deltatune.training.task import Scores

log = logging.getLogger("deltatune")

_TRAINED = 2**27
"""Bytes of logits that exist at once in training: their gradient takes their place."""
_SCORED = 2**26
"""Bytes of the float32 copies of logits that exist at once in scoring."""


class LanguageModelling:
    """A decoder or encoder–decoder and the texts that it learns to write."""

    packing: Packing | None = None
    """How texts stand in one row, without padding; None where they do not."""

    def __init__(
        self, base: Base, precision: Computed, *, chunked: bool | None = None, packs: bool = True, shares: bool = True
    ) -> None:
        self.model = base.model
        self._tokenizer = base.tokenizer
        self._precision = precision
        self._pad = base.model.config.pad_token_id
        self._both = bool(base.model.config.is_encoder_decoder)
        self._chunked = chunked
        """Whether the output layer alone makes the logits; None until it was tried."""
        self._packs, self._shares = packs, shares
        """Whether texts may stand in one row, if it turns out that they can, and there have their beginning once."""
        self._tried = False

    def encode(self, split: Dialogues, limit: int) -> Sequences:
        """The dialogues as token ids with their targets."""
        return encode(split, self._tokenizer, limit=limit, encoder_decoder=self._both)

    def collate(self, examples: Sequences, places: Sequence[int]) -> Batch:
        """The examples at `places`, padded on the right."""
        return collate_sequences(examples, places, self._pad, length_step(self.model))

    def run(self, batch: Batch) -> Float[Tensor, "examples length vocabulary"]:
        """All logits at once."""
        with autocast(self._precision, self.model.device):
            logits: Tensor = self.model(**self._inputs(batch)).logits
        return logits

    def backward(self, batch: Batch, units: int) -> float:
        """Adds the gradients of the scored tokens' losses, summed and divided by `units`; gives that quotient."""
        hidden, targets, _ = self._scored(batch)
        total, gradients = 0.0, []
        for rows, wanted in self._chunks(hidden, targets):
            leaf = self._filled(rows.detach()).requires_grad_(hidden.requires_grad)
            logits = self._logits(leaf)
            made, gradient = get_gradient_edge(logits), logits.detach()  # once a view is written over, it has another
            total += cross_entropy_(gradient[: len(rows)], wanted, units)
            gradient[len(rows) :] = 0
            torch.autograd.backward(made, gradient)
            gradients.append(None if leaf.grad is None else leaf.grad[: len(rows)])
        if hidden.requires_grad:
            hidden.backward(torch.cat([gradient for gradient in gradients if gradient is not None]))  # type: ignore[no-untyped-call]
        return total

    def evaluate(self, examples: Sequences) -> Scores:
        """Loss and perplexity over the scored tokens of every example; of each example its mean loss."""
        losses = torch.zeros(len(examples), dtype=torch.float64)
        counts = torch.zeros(len(examples), dtype=torch.float64)
        with evaluating(self.model):
            for places in by_length(examples.lengths, SCORED_TOKENS):
                hidden, targets, rows = self._scored(self.collate(examples, places))
                each = [
                    F.cross_entropy(self._logits(self._filled(part))[: len(part)].float(), wanted, reduction="none")
                    for part, wanted in self._chunks(hidden, targets, scoring=True)
                ]
                owners = torch.tensor(places)[rows.cpu()]
                losses.index_add_(0, owners, torch.cat(each).double().cpu())
                counts.index_add_(0, owners, torch.ones(len(owners), dtype=torch.float64))
        loss = (losses.sum() / counts.sum()).item()
        return Scores("loss", {"loss": loss, "perplexity": float(torch.tensor(loss).exp())}, (losses / counts).tolist())

    def test(self, split: Dialogues, limit: int, decoding: Decoding) -> Scores:
        """Loss and perplexity, and how near what the model writes comes to the references; ROUGE-L counts most.

        A prompt that stands there several times is answered once, and all its answers are references.
        """
        plain = self.evaluate(self.encode(split, limit))
        wanted: dict[tuple[int, ...], list[str]] = {}
        asked = prompts_before_answers(self.model, self._tokenizer, split, limit, decoding)
        for ids, reference in zip(asked, references(split), strict=True):
            wanted.setdefault(tuple(ids), []).append(reference)
        written = generate(self.model, self._tokenizer, [*map(list, wanted)], decoding, self._precision)
        texts = score_texts(written, [*wanted.values()])
        outputs = [
            {"prompt": self._tokenizer.decode(ids), "references": known, "prediction": text}
            for (ids, known), text in zip(wanted.items(), written, strict=True)
        ]
        return Scores("rougeL", {**texts.figures, **plain.figures}, texts.examples["rougeL"], outputs, texts.variants)

    def try_out(self, batch: Batch) -> None:
        """The first time: finds whether the output layer alone makes the logits, and whether texts can be packed."""
        if self._chunked is None:
            self._chunked = self._output_layer_alone(batch)
        if self._chunked and self._packs and not self._tried:
            self.packing = find_packing(self.model, self.hidden, self._precision, self._shares)
        self._tried = True

    def _scored(
        self, batch: Batch
    ) -> tuple[Float[Tensor, "scored width"], Int[Tensor, " scored"], Int[Tensor, " scored"]]:
        """What the logits of scored tokens are made from, these tokens, and the row of the batch that each is in."""
        labels = batch.labels.to(self.model.device)
        self.try_out(batch)
        ahead = 0 if self._both else 1  # a decoder says each token after the one before it
        rows, places = (labels[:, ahead:] != UNSCORED).nonzero(as_tuple=True)
        if self.packing is not None:
            row = self.packing.row(batch.inputs["input_ids"], read_tokens(labels))
            entering = self.hidden(row.inputs)[0, row.places[rows, places]]
        else:
            hidden = self.hidden(self._inputs(batch)) if self._chunked else self.run(batch)
            entering = hidden[rows, places]
        return entering, labels[rows, places + ahead], rows

    def _logits(self, hidden: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows vocabulary"]:
        if not self._chunked:
            return hidden  # the model has made them
        with autocast(self._precision, self.model.device):
            logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits

    def _filled(self, hidden: Float[Tensor, "rows width"]) -> Float[Tensor, "more width"]:
        """With rows of zeros to make a multiple of 32 (see `data.batches`), where logits are to be computed of them."""
        return F.pad(hidden, (0, 0, 0, -len(hidden) % ROWS)) if self._chunked else hidden

    def _chunks(
        self, hidden: Float[Tensor, "scored width"], targets: Int[Tensor, " scored"], scoring: bool = False
    ) -> Iterator[tuple[Float[Tensor, "rows width"], Int[Tensor, " rows"]]]:
        """Parts of about the same size: each reads the output layer's weight once more."""
        logits = _SCORED // 4 if scoring else _TRAINED // hidden.element_size()
        most = max(ROWS, logits // self.model.config.get_text_config().vocab_size // ROWS * ROWS)
        parts = max(1, -(-len(targets) // most))
        size = max(1, -(-len(targets) // (parts * ROWS)) * ROWS)
        return zip(torch.split(hidden, size), torch.split(targets, size), strict=True)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        inputs: dict[str, Any] = {name: tensor.to(self.model.device) for name, tensor in batch.inputs.items()}
        if "use_cache" in inspect.signature(self.model.forward).parameters:
            inputs["use_cache"] = False  # nobody reads the keys and values that Transformers would keep of every layer
        if self._both:
            labels = batch.labels.to(self.model.device)
            inputs["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels=labels)
        return inputs

    def hidden(self, inputs: Mapping[str, Any]) -> Float[Tensor, "examples length width"]:
        """What enters the output layer: the model is stopped there."""

        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            raise _Reached(args[0])

        handle = self.model.get_output_embeddings().register_forward_pre_hook(stop)
        try:
            with autocast(self._precision, self.model.device):
                self.model(**inputs)
        except _Reached as reached:
            return reached.hidden
        finally:
            handle.remove()
        raise AssertionError("a language model uses its output layer")

    def _output_layer_alone(self, batch: Batch) -> bool:
        """Whether the logits are the output layer's own, tried out on an example; some models cap or scale them."""
        one = Batch(
            {name: tensor[:1] for name, tensor in batch.inputs.items()}, batch.labels[:1], batch.indices[:1], 0, 0
        )
        with evaluating(self.model):
            whole = self.run(one)
            self._chunked = True
            same = torch.equal(whole, self._logits(self.hidden(self._inputs(one))))
        if not same:
            log.warning("%s changes its logits after the output layer: they are all kept", type(self.model).__name__)
        return same


def read_tokens(labels: Int[Tensor, "texts length"]) -> Int[Tensor, " texts"]:
    """Of how many tokens of each text anything is learnt: after the last one that is scored nobody asks.

    That one itself is said, and not read.
    """
    places = torch.arange(labels.shape[1], device=labels.device)
    return ((labels != UNSCORED) * places).amax(1).clamp_(min=1)


class _Reached(Exception):  # noqa: N818  # it is no error
    """The model has come to its output layer."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden
