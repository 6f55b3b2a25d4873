"""Where a training step goes: the seconds of its parts, forward and backward, beside the products it cannot do without.

Steps are run under PyTorch's profiler with a mark around every layer, attention and norm. Each operation's own time
counts for the innermost mark that it runs in; an operation of the backward pass for the mark of the operation that it
differentiates, which its sequence number says. Profiling costs time of its own: it gives the shares, and steps without
it the seconds.
"""

import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as profiled
from transformers import PreTrainedModel

from deltatune import kernels
from deltatune.data.batches import Batch
from deltatune.data.sequences import Sequences
from deltatune.data.tokens import Tokens
from deltatune.dropout import Dropout
from deltatune.errors import UserError
from deltatune.methods import Method
from deltatune.models import short_attention
from deltatune.models.adapted import Adapted, Added
from deltatune.models.attach import attach, learning_rates, penalty, trainable_parameters
from deltatune.models.base import Base
from deltatune.models.gates import has_gates
from deltatune.models.gelu import GELU
from deltatune.models.norms import RMSNorm
from deltatune.models.positions import room_for_text
from deltatune.models.products import has_products
from deltatune.models.roles import ALIASES, base_layers, linear_roles
from deltatune.models.rotations import has_rotations
from deltatune.training.language import LanguageModelling
from deltatune.training.optimisers import make_optimiser
from deltatune.training.pieces import PIECES, Piece, quicken
from deltatune.training.pooled import pooled
from deltatune.training.precision import Computed, Precision, prepare, resolve
from deltatune.training.task import Task
from deltatune.training.tasks import task_for
from deltatune.weights import is_linear, weight_of
from deltatune.weights.storage import BITS

PARTS: Mapping[str, str] = {
    "linears": "products with the frozen weights",
    "method": "what the method adds to the adapted layers, decoding of weights in few bits included",
    "attention": "attention between the linear layers",
    "norms": "normalisations",
    "loss": "output layer and loss",
    "optimiser": "clipping and optimiser",
    "rest": "embeddings, activations, dropout, sums, Python",
}
_MARK = "part of the step: "
_BACKWARD = "autograd::engine::evaluate_function"
_ADAPTED = "adapted"
"""The mark of an adapted layer: its products with the frozen weight are the linears', the rest is the method's."""
_FORWARD = 0
"""The scope that the profiler gives to operations."""
_REPEATS = 5
_PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1} | dict.fromkeys(kernels.PRODUCTS, 0)
"""Operations that multiply matrices, with the place of the first of both factors."""
Product = tuple[int, int, int]
"""Rows, inner features and columns of a product of two matrices."""


@dataclass(frozen=True)
class Profile:
    """What a step costs and on what."""

    seconds: float
    """Of a step: the median."""
    parts: Mapping[str, float]
    """Seconds of each of `PARTS`; they sum to `seconds`."""
    limit: float
    """Seconds of the step's products with frozen weights, into memory that is there, and of nothing else."""
    tokens: int
    precision: Computed
    attention: str
    """The implementation that the model uses, by the name that Transformers has for it."""
    pieces: tuple[Piece, ...]
    """The fast pieces that the step has; the architecture, the length or the device has no use for the others."""

    @property
    def reached(self) -> float:
        """The limit as a share of the step: 1 would be a step that only multiplies with frozen weights."""
        return self.limit / self.seconds


def profile_step(
    base: Base,
    method: Method,
    *,
    tokens: int = 1024,
    length: int = 128,
    precision: Precision = "auto",
    steps: int = 5,
    seed: int = 0,
) -> Profile:
    """Profiles training steps of `method` on `base`, whose model is changed in place, with texts of random tokens.

    A step has `tokens` tokens in texts of `length` each; a language model learns all of them. Raises `UserError` where
    the model has no positions for so long a text, for targets that match nothing, and for a method that trains nothing.
    """
    model, computed = base.model, resolve(precision, base.model.device)
    room = room_for_text(model.config, getattr(method, "virtual_tokens", 0))
    if not 2 <= length <= tokens or (room is not None and length > room):
        most = min(tokens, room or tokens)
        raise UserError(f"there is no step of {tokens} tokens in texts of {length}", f"take a length from 2 to {most}")
    task = task_for(base, computed)
    batch = random_batch(base, task, tokens // length, length, seed)
    attach(model, method, seed=seed, examples=iter([{**batch.inputs, "labels": batch.labels}]))
    prepare(model, computed)
    quicken(model, length)
    model.train()
    with torch.random.fork_rng(), pooled(model, lambda: task.run(batch)) as reads_one:
        torch.manual_seed(seed)
        step = _Step(task, batch)
        seconds = _timed(step, steps)
        shares, products = _shares(step, model, batch.tokens)
    dtype = torch.bfloat16 if computed == "bf16" else torch.float32
    return Profile(
        seconds=seconds,
        parts={part: share * seconds for part, share in shares.items()},
        limit=sum(count * _product_seconds(product, dtype, model.device) for product, count in products.items()),
        tokens=batch.tokens,
        precision=computed,
        attention=str(model.config._attn_implementation),
        pieces=pieces_of(model, task, batch, reads_one),
    )


def pieces_of(model: PreTrainedModel, task: Task, batch: Batch, reads_one: bool) -> tuple[Piece, ...]:
    """The fast pieces that steps of a model have, after `quicken`; `reads_one` as `pooled` says."""
    packing = None
    if isinstance(task, LanguageModelling):
        task.try_out(batch)
        packing = task.packing
    runs: dict[Piece, bool] = {
        "attention": model.config._attn_implementation == short_attention.NAME,
        "dropout": any(isinstance(module, Dropout) for module in model.modules()),
        "gates": has_gates(model),
        "gelu": any(isinstance(module, GELU) for module in model.modules()),
        "norms": any(isinstance(module, RMSNorm) for module in model.modules()),
        "packing": packing is not None,
        "pooled": reads_one,
        "products": has_products(model),
        "rotations": has_rotations(model),
        "sharing": packing is not None and packing.shares,
    }
    return tuple(piece for piece in PIECES if runs[piece])


class _Step:
    """One optimiser step on one batch, as the loop makes it."""

    def __init__(self, task: Task, batch: Batch) -> None:
        self._task, self._batch = task, batch
        self._parameters = trainable_parameters(task.model)
        if not self._parameters:
            raise UserError("the method trains nothing here, so there is no step", "choose another method")
        self._optimiser = make_optimiser("adamw", self._parameters, learning_rates(task.model), 0.01)
        for group in self._optimiser.param_groups:
            group["lr"] = 0.0  # what is measured stays what it was

    def __call__(self) -> None:
        with record_function(f"{_MARK}loss"):  # but for what the model has marked
            self._task.backward(self._batch, self._batch.units)
        if (extra := penalty(self._task.model)) is not None:
            with record_function(f"{_MARK}method"):
                extra.backward()  # type: ignore[no-untyped-call]
        with record_function(f"{_MARK}optimiser"):
            nn.utils.clip_grad_norm_(self._parameters.values(), 1.0)
            self._optimiser.step()
            self._optimiser.zero_grad()


def random_batch(base: Base, task: Task, texts: int, length: int, seed: int = 0) -> Batch:
    """Texts of random tokens, each with one end token; a language model learns all of them."""
    config = base.model.config.get_text_config()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    plain = torch.tensor([id for id in range(config.vocab_size) if id not in (*ends, config.pad_token_id)])
    chosen = torch.randint(len(plain), (texts, length), generator=torch.Generator().manual_seed(seed))
    ids = plain[chosen]  # (texts, length)
    if ends[0] is not None:
        ids[:, -1] = ends[0]  # by which some models classify
    rows = ids.tolist()
    if base.task == "generation":
        return task.collate(Sequences(tuple(rows), tuple(rows), 0), range(texts))
    labels = tuple(number % base.model.config.num_labels for number in range(texts))
    return task.collate(Tokens(tuple({"input_ids": row} for row in rows), labels, 0), range(texts))


def _timed(step: _Step, steps: int) -> float:
    times = []
    for _ in range(steps + 2):  # two of warming up
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def _shares(step: _Step, model: PreTrainedModel, tokens: int) -> tuple[dict[str, float], Counter[Product]]:
    """What share of a step each part has, and the step's products with frozen weights."""
    weights = [weight_of(layer) for _, layer in base_layers(model) if is_linear(layer)]
    sides = [(weight.out, weight.in_) for weight in weights]
    with _marked(model), profiled(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        step()
    events = list(seen.events())
    spent, products = dict.fromkeys(PARTS, 0.0), Counter[Product]()
    for event, mark in zip(events, _marks(events), strict=True):
        product = _product(event, sides, tokens)
        if product is not None:
            products[product] += 1
        if mark == _ADAPTED:
            mark = "method" if product is None else "linears"
        spent[mark] += max(0.0, event.self_cpu_time_total)
    whole = sum(spent.values())
    return {part: took / whole for part, took in spent.items()}, products


def _marks(events: list[Any]) -> list[str]:
    """The mark that each event of the profiler counts for."""
    forward: dict[int, tuple[float, str]] = {}
    found: dict[int, str] = {}

    def of(event: Any) -> str:
        """The innermost mark around it; within a node of the backward pass that of the node's forward operation."""
        if event is None:
            return "rest"
        if id(event) not in found:
            name, number = event.name, event.sequence_nr
            if name.startswith(_MARK):
                found[id(event)] = name.removeprefix(_MARK)
            elif name.startswith(_BACKWARD) and number in forward:
                found[id(event)] = forward[number][1]
            else:
                found[id(event)] = of(event.cpu_parent)
        return found[id(event)]

    for event in events:
        # Several operations have the number of the node to come; the last of them made it.
        if event.scope == _FORWARD and event.sequence_nr >= 0 and not event.name.startswith(_BACKWARD):
            made = (event.time_range.start, of(event))
            forward[event.sequence_nr] = max(made, forward.get(event.sequence_nr, made))
    return [of(event) for event in events]


def _product(event: Any, sides: list[tuple[int, int]], tokens: int) -> Product | None:
    """The product with a frozen weight that an event is, by its shapes; None for any other event."""
    if event.name not in _PRODUCTS:
        return None
    place = _PRODUCTS[event.name]
    left, right = (tuple(shape) for shape in event.input_shapes[place : place + 2])
    if event.name in kernels.PRODUCTS:  # it is given a weight, or rows of bytes that stand for one
        right = right[::-1] if right in sides or right[::-1] in sides else _decoded(right, left[1], sides)
    product = (*left, right[1])
    thin = min(product) < min(map(min, sides))
    for factor in (left, right):
        if factor in sides or factor[::-1] in sides:
            # As many tokens as a weight has rows: their product with a method's thin matrix looks like the weight's.
            return None if thin and tokens in factor else product
    return None


def _decoded(stored: tuple[int, int], inner: int, sides: list[tuple[int, int]]) -> tuple[int, int]:
    """The shape, or its transpose, of the weight that rows of bytes stand for; it multiplies so many features."""
    rows, size = stored
    for out, width in sides:
        if out == rows and inner in (out, width) and 8 * size in [bits * width for bits in BITS.values()]:
            return (width, out) if inner == width else (out, width)
    return stored


@contextmanager
def _marked(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the model's modules put marks around what they run."""
    roles = linear_roles(model)
    inputs = {role for alias in ("attention-qv", "attention-kv") for role in ALIASES[alias]}
    attention = {path.rpartition(".")[0] for path, role in roles.items() if role in inputs}
    output = model.get_output_embeddings() if model.can_generate() else None
    open_marks: list[record_function] = []

    def begin(part: str) -> None:
        open_marks.append(record_function(f"{_MARK}{part}"))
        open_marks[-1].__enter__()  # type: ignore[no-untyped-call]

    def end(*_: object) -> None:
        open_marks.pop().__exit__(None, None, None)

    with ExitStack() as hooks:
        for path, module in model.named_modules():
            part = (
                "rest" if module is model else "loss" if module is output else "attention" if path in attention else ""
            )
            part = part or _part(module)
            if part:
                hooks.callback(module.register_forward_pre_hook(lambda *_, part=part: begin(part)).remove)
                hooks.callback(module.register_forward_hook(end, always_call=True).remove)
        yield


def _part(module: nn.Module) -> str:
    if isinstance(module, Adapted):
        return _ADAPTED
    if isinstance(module, Added):
        return "method"
    if is_linear(module):
        return "linears"
    return "norms" if any(kind.__name__.rstrip("123d").endswith("Norm") for kind in type(module).__mro__) else ""


def _product_seconds(product: Product, dtype: torch.dtype, device: torch.device) -> float:
    rows, inner, columns = product
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(columns, inner, device=device).to(dtype).T
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    multiply = partial(torch.mm, left, right, out=out)
    if kernels.multiplies(left, right.T):
        multiply = partial(kernels.product, left, right.T)
    times = []
    for _ in range(_REPEATS + 1):
        began = time.perf_counter()
        multiply()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
