"""Writing with a language model: batches of prompts, continued greedily, by beams or by sampling.

Prompts of like length go together: before a decoder padded on the left, so that all end where writing begins, before an
encoder on the right. The masks say what is padding, so what is written does not depend on it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Int
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from deltatune.data.batches import in_order
from deltatune.data.dialogues import Dialogues, Turn
from deltatune.data.encode import prompts as encoded_prompts
from deltatune.data.templates import pieces
from deltatune.data.tokens import length_limit
from deltatune.errors import UserError, unknown
from deltatune.models.attach import attachment
from deltatune.models.base import quiet
from deltatune.models.positions import room_for_text
from deltatune.training.modes import evaluating
from deltatune.training.precision import Computed, autocast

Ids = list[int]


class Decoding(BaseModel):
    """How a text is written: greedily unless beams or a temperature are given."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    max_new_tokens: int = Field(64, ge=1)
    """Most tokens to write; fewer where the model has no positions for more."""
    beams: int = Field(1, ge=1)
    """Continuations that are kept side by side; of them the most probable is taken."""
    length_penalty: float = 1.0
    """With beams: the power of its length that a continuation's log-probability is divided by; above 1 favours long."""
    no_repeat_ngram: int = Field(0, ge=0)
    """No run of so many tokens is written twice in a text, its prompt included; 0 allows all."""
    temperature: float = Field(0.0, ge=0)
    """0 takes the most probable token. Above 0 tokens are drawn, from logits divided by it."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Tokens are drawn from the most probable ones that together reach this share; needs a temperature."""
    top_k: int = Field(0, ge=0)
    """Tokens are drawn from so many most probable ones; 0 for all. Needs a temperature."""
    seed: int = 0
    """Decides what is drawn, together with all the prompts and their batches."""
    batch_tokens: int = Field(8192, ge=1)
    """Tokens in a batch: prompts, padding and what is written, of all beams."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Decoding":
        if not self.temperature and (self.top_k or self.top_p < 1):
            raise UserError(
                "top_p and top_k say what is drawn from, and nothing is drawn",
                "give a temperature, such as 0.7, as well",
            )
        if self.temperature and self.beams > 1:
            raise UserError("beams are searched, and with a temperature tokens are drawn", "leave out one of the two")
        return self


def read_decoding(given: Mapping[str, Any]) -> Decoding:
    """The settings as a file or a command line names them. Raises `UserError` that names a wrong one."""
    for name in given:
        if name not in Decoding.model_fields:
            raise unknown("setting of writing", name, Decoding.model_fields)
    try:
        return Decoding.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        wrong, words = str(first["loc"][0]), first["msg"].removeprefix("Input ")
        hint = f"{wrong}: {Decoding.model_fields[wrong].description}"
        raise UserError(f"{wrong} {words}, not {first['input']!r}", hint) from error


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Ids],
    decoding: Decoding | None = None,
    precision: Computed = "fp32",
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """What the model writes after each prompt, without the prompt and special tokens, in the prompts' order.

    `precision` is what the model was prepared for. `progress` is told after each batch how many texts of how many are
    written. Modes, generation settings and random state are left as they were. See `generate_tokens` for the errors.
    """
    written = generate_tokens(model, tokenizer, prompts, decoding, precision, progress=progress)
    return [_text(tokenizer, ids) for ids in written]


def generate_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Ids],
    decoding: Decoding | None = None,
    precision: Computed = "fp32",
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Ids]:
    """As `generate`, as token ids without the one that ended each text.

    A text ends at an end token of the model or tokenizer, or where the chat template ends a turn. An empty prompt
    becomes the beginning token, or the end token where there is none. Raises `UserError` for a model that cannot
    write, and for a prompt that leaves no position to write at.
    """
    decoding = decoding or Decoding()
    begun = _begun(model, tokenizer, prompts)
    room = _room(model, begun, decoding)
    written: list[Ids] = [[] for _ in begun]
    done = 0
    with _ready(model, tokenizer, decoding, precision) as settings:
        for places in _batches(begun, room, decoding):
            texts = _write(model, [begun[place] for place in places], settings, room[places[0]])
            for place, ids in zip(places, texts, strict=True):
                written[place] = ids
            done += len(places)
            if progress is not None:
                progress(done, len(begun))
    return written


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Ids,
    tell: Callable[[str], None],
    decoding: Decoding | None = None,
    precision: Computed = "fp32",
) -> str:
    """As `generate` for one prompt; `tell` is given the text piece by piece, as soon as a piece is sure.

    Raises `UserError` as `generate_tokens` does, and for beams, which are not sure of anything before the end.
    """
    decoding = decoding or Decoding()
    if decoding.beams > 1:
        raise UserError("beams cannot be shown while they are searched", "leave out the beams")
    begun = _begun(model, tokenizer, [prompt])
    [room] = _room(model, begun, decoding)
    with _ready(model, tokenizer, decoding, precision) as settings:
        [ids] = _write(model, begun, settings, room, _Told(tokenizer, tell))
    return _text(tokenizer, ids)


def prompts_before_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, split: Dialogues, limit: int, decoding: Decoding
) -> list[Ids]:
    """What each example's last turn is written after: at most `limit` tokens, and fewer where positions are short.

    See `deltatune.data.encode.prompts` for what is cut, and for the errors.
    """
    both, new = bool(model.config.is_encoder_decoder), decoding.max_new_tokens
    whole = length_limit(tokenizer, model.config, limit + (0 if both else new), virtual_tokens(model))
    return encoded_prompts(split, tokenizer, limit=whole, encoder_decoder=both, room=min(new, whole // 2))


def virtual_tokens(model: PreTrainedModel) -> int:
    """How many positions the active adapter takes for tokens of its own."""
    found = attachment(model)
    return sum(getattr(part.method, "virtual_tokens", 0) for part in found.parts) if found else 0


class _Told(TextStreamer):  # type: ignore[misc]  # Transformers is not typed
    """Gives whole words to a function."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tell: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tell = tell

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Is called by Transformers with each new piece."""
        if text:
            self.tell(text)


def _begun(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Ids]) -> list[Ids]:
    if not model.can_generate():
        raise UserError(
            f"{type(model).__name__} cannot write text", "load the base as a language model: deltatune.load(name)"
        )
    tokens = (tokenizer.bos_token_id, model.config.bos_token_id, tokenizer.eos_token_id)
    beginning = next((token for token in tokens if token is not None), None)
    if beginning is None and not all(prompts):
        raise UserError("a prompt is empty, and the tokenizer has no token to begin with", "give it some words")
    return [list(prompt) or [beginning] for prompt in prompts]  # type: ignore[list-item]  # checked above


def _room(model: PreTrainedModel, prompts: Sequence[Ids], decoding: Decoding) -> list[int]:
    """How many tokens may be written after each prompt."""
    positions = room_for_text(model.config, virtual_tokens(model))
    if positions is None:
        return [decoding.max_new_tokens] * len(prompts)
    both = model.config.is_encoder_decoder
    left = [positions - (1 if both and len(prompt) <= positions else len(prompt)) for prompt in prompts]
    for number, (prompt, places) in enumerate(zip(prompts, left, strict=True), 1):
        if places < 1:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens and this model has positions for {positions}: "
                "there is nowhere to write",
                "shorten the prompt",
            )
    return [min(decoding.max_new_tokens, places) for places in left]


def _batches(prompts: Sequence[Ids], room: Sequence[int], decoding: Decoding) -> Iterator[list[int]]:
    """Places of prompts of like length, with the same room, so that none is cut short for the sake of another."""
    sizes = [decoding.beams * (len(prompt) + new) for prompt, new in zip(prompts, room, strict=True)]
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    for _, places in groupby(order, key=room.__getitem__):
        yield from in_order(sizes, decoding.batch_tokens, list(places))


@contextmanager
def _ready(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, decoding: Decoding, precision: Computed
) -> Iterator[GenerationConfig]:
    """The model ready to write, and how it does; afterwards everything is as it was."""
    own = model.generation_config
    settings = _settings(own, tokenizer, decoding)
    model.generation_config = GenerationConfig()  # what it has would stand in for what ours leaves open
    handle = model.get_output_embeddings().register_forward_pre_hook(_in_one_piece)
    try:
        with evaluating(model), quiet(), autocast(precision, model.device), torch.random.fork_rng():
            torch.manual_seed(decoding.seed)
            yield settings
    finally:
        handle.remove()
        model.generation_config = own


def _in_one_piece(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A copy of the last tokens' states: for a slice PyTorch would copy the weight, once for each text."""
    return args[0].contiguous(), *args[1:]


def _settings(own: GenerationConfig, tokenizer: PreTrainedTokenizerBase, decoding: Decoding) -> GenerationConfig:
    """Transformers' form of `decoding`. Of the model's own settings only its special tokens stay."""
    sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k}
    beams = {"length_penalty": decoding.length_penalty} if decoding.beams > 1 else {}
    return GenerationConfig(
        num_beams=decoding.beams,
        **beams,
        no_repeat_ngram_size=decoding.no_repeat_ngram,
        do_sample=decoding.temperature > 0,
        **(sampling if decoding.temperature else {}),
        use_cache=True,
        eos_token_id=sorted(_ends(own, tokenizer)) or None,
        pad_token_id=_first(tokenizer.pad_token_id, tokenizer.eos_token_id, 0),
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
        forced_bos_token_id=own.forced_bos_token_id,
    )


def _ends(own: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a text: those of the model and the tokenizer, and the one that ends a turn of a chat."""
    eos = own.eos_token_id
    ends = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id}
    if tokenizer.chat_template:
        said = (Turn("user", "?", scored=False), Turn("assistant", "…", scored=True))
        with suppress(UserError):  # a template that fails is told where a chat is written with it
            after = pieces(said, tokenizer)[-1].text.rpartition("…")[2]
            ids: Any = tokenizer(after, add_special_tokens=False)["input_ids"]
            special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
            ends.add(next((id for id in ids if id in special), None))
    return {end for end in ends if end is not None}


def _write(
    model: PreTrainedModel,
    prompts: list[Ids],
    settings: GenerationConfig,
    new: int,
    streamer: TextStreamer | None = None,
) -> list[Ids]:
    """The tokens that follow each prompt, up to the one that ends the text."""
    both = model.config.is_encoder_decoder
    ids, mask = _padded(prompts, settings.pad_token_id, left=not both)
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=settings,
        max_new_tokens=new,
        streamer=streamer,
    )
    ends = set(settings.eos_token_id or ())
    written = output[:, 1 if both else ids.shape[1] :].tolist()
    return [row[: next((place for place, id in enumerate(row) if id in ends), len(row))] for row in written]


def _padded(
    prompts: list[Ids], pad: int, *, left: bool
) -> tuple[Int[Tensor, "examples length"], Int[Tensor, "examples length"]]:
    """The prompts and the mask of what is not padding."""
    longest = max(map(len, prompts))
    rows, marks = [], []
    for prompt in prompts:
        fill = longest - len(prompt)
        before, after = (fill, 0) if left else (0, fill)
        rows.append([pad] * before + prompt + [pad] * after)
        marks.append([0] * before + [1] * len(prompt) + [0] * after)
    return torch.tensor(rows), torch.tensor(marks)


def _text(tokenizer: PreTrainedTokenizerBase, ids: Ids) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)
