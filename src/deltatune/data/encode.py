"""From dialogues to token ids: once, unpadded, before training starts, and as prompts before generation.

What is too long gives up the least that serves: a chat with several answers its last turns; then the longest turn that
is not to be learnt, mostly the document or question, its end, while the words around it stay; then the answer its end.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from deltatune.data.dialogues import Dialogue, Dialogues, Turn
from deltatune.data.sequences import UNSCORED, Sequences
from deltatune.data.templates import Piece, has_template, pieces
from deltatune.errors import UserError

Turns = tuple[Turn, ...]
Ids = list[int]


def encode(
    split: Dialogues,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int,
    encoder_decoder: bool,
    score: Literal["answers", "all"] = "answers",
) -> Sequences:
    """Every example as at most `limit` tokens; in an encoder–decoder that many to read and that many to write.

    A decoder reads the whole example and learns its scored turns, each with the token that ends it; with `score="all"`
    it learns everything. A start token comes first where the tokenizer puts one, or where the chat template does. An
    encoder–decoder reads what comes before the last scored turn and learns that turn alone.
    Raises UserError that names the first example of which nothing is left to learn.
    """
    if encoder_decoder:
        return _encode_pairs(split, tokenizer, limit)
    whole = _joined([pieces(example.turns, tokenizer) for example in split.examples], tokenizer)
    inputs, targets, truncated = [], [], 0
    for example, parts in zip(split.examples, whole, strict=True):
        start = _start(example.turns, tokenizer)
        if _length(parts, start) > limit:
            truncated += 1
            parts = _shortened(example.turns, tokenizer, limit - len(start))
        ids, learnt = _started(start, parts, score == "all")
        learnt = [UNSCORED, *learnt[1:limit]]  # nothing comes before the first token, to write it after
        if all(target == UNSCORED for target in learnt):
            raise _nothing_left(example, limit)
        inputs.append(ids[:limit])
        targets.append(learnt)
    return Sequences(tuple(inputs), tuple(targets), truncated)


def prompts(
    split: Dialogues, tokenizer: PreTrainedTokenizerBase, *, limit: int, encoder_decoder: bool, room: int = 0
) -> list[Ids]:
    """What generation of each example's last scored turn begins with, in at most `limit` tokens.

    A decoder goes on writing where the prompt ends: `room` of the limit are kept free for what it writes. Where nothing
    was cut, the tokens are those that training has before the answer. Plain text has no prompt: it begins with the
    start token, or else with the end token, which stands between texts.
    Raises UserError where the words around the turns alone are too long.
    """
    room = 0 if encoder_decoder else room
    found = []
    for example in split.examples:
        start = [] if encoder_decoder else _start(example.turns, tokenizer)
        most = limit - room - len(start)
        ids, _ = _asked(example, tokenizer, most, encoder_decoder)
        if len(ids) > most:
            raise UserError(
                f"{_named(example)} has no prompt of {most} tokens: what stands around its turns is longer",
                "allow more tokens, or fewer new ones",
            )
        found.append((ids if ids[:1] == start else [*start, *ids]) or [tokenizer.eos_token_id])
    return found


def references(split: Dialogues) -> list[str]:
    """The last scored turn of each example, without outer spaces: what the generated text is held against."""
    return [example.answer.content.strip() for example in split.examples]


def _encode_pairs(split: Dialogues, tokenizer: PreTrainedTokenizerBase, limit: int) -> Sequences:
    inputs, targets, truncated = [], [], 0
    for example in split.examples:
        if not example.prompt:
            raise UserError(
                f"{_named(example)} is plain text, which leaves an encoder nothing to read",
                "give prompts with completions, or take a base that is a decoder",
            )
        read, cut = _asked(example, tokenizer, limit, encoder_decoder=True)
        said = tokenizer(text_target=example.answer.content.strip(), verbose=False).input_ids
        if tokenizer.eos_token_id is not None and said[-1:] != [tokenizer.eos_token_id]:
            said = [*said, tokenizer.eos_token_id]
        if not said[:limit]:
            raise _nothing_left(example, limit)
        truncated += cut or max(len(read), len(said)) > limit
        inputs.append(read[:limit])
        targets.append(said[:limit])
    return Sequences(tuple(inputs), tuple(targets), truncated)


def _asked(
    example: Dialogue, tokenizer: PreTrainedTokenizerBase, limit: int, encoder_decoder: bool
) -> tuple[Ids, bool]:
    """What comes before the last scored turn, cut to the limit where its turns can be cut; whether it was cut."""
    turns, cut = (*example.prompt, example.answer), False
    while True:
        ids = _before_answer(turns, tokenizer, encoder_decoder)
        shorter = _cut(turns, len(ids) - limit, tokenizer, range(len(turns) - 1)) if len(ids) > limit else None
        if shorter is None:
            return ids, cut
        turns, cut = shorter, True


def _before_answer(turns: Turns, tokenizer: PreTrainedTokenizerBase, encoder_decoder: bool) -> Ids:
    before = pieces(turns, tokenizer)[:-1]
    if encoder_decoder:
        framed = not has_template(turns, tokenizer)
        return _read("".join(piece.text for piece in before), tokenizer, framed)
    return [token for ids, _ in _joined([before], tokenizer)[0] for token in ids]


def _shortened(turns: Turns, tokenizer: PreTrainedTokenizerBase, limit: int) -> list[tuple[Ids, bool]]:
    """The turns in at most `limit` tokens as far as that goes without cutting an answer."""
    while True:
        parts = _joined([pieces(turns, tokenizer)], tokenizer)[0]
        over = _length(parts) - limit
        if over <= 0:
            return parts
        scored = [place for place, turn in enumerate(turns) if turn.scored]
        if len(scored) > 1:
            turns = turns[: scored[-2] + 1]
            continue
        shorter = _cut(turns, over, tokenizer, [place for place, turn in enumerate(turns) if not turn.scored])
        if shorter is None:
            return parts
        turns = shorter


def _cut(turns: Turns, over: int, tokenizer: PreTrainedTokenizerBase, places: Sequence[int]) -> Turns | None:
    """The turns with `over` tokens less at the end of the longest of those at `places`; None where they are empty."""
    lengths = {place: len(_read(turns[place].content, tokenizer)) for place in places if turns[place].content}
    if not lengths:
        return None
    longest = max(lengths, key=lengths.__getitem__)
    content, keep = turns[longest].content, max(0, lengths[longest] - over)
    if keep and tokenizer.is_fast:
        offsets = tokenizer(
            content, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        ).offset_mapping
        end = offsets[keep][0]
    else:
        end = keep and len(content) * keep // lengths[longest]
    cut = replace(turns[longest], content=content[:end])
    return (*turns[:longest], cut, *turns[longest + 1 :])


def _joined(rows: list[list[Piece]], tokenizer: PreTrainedTokenizerBase) -> list[list[tuple[Ids, bool]]]:
    """The tokens of each piece of each row, with whether they are scored; no token depends on a later piece.

    Each piece gets the tokens that it has after those before it, as when the text is read whole. Where a token would
    reach over the border, the piece is read alone, as it will be when it is generated.
    """
    grown = ["".join(piece.text for piece in row[: place + 1]) for row in rows for place in range(len(row))]
    encoded = iter(tokenizer(grown, add_special_tokens=False, verbose=False).input_ids if grown else ())
    found = []
    for row in rows:
        parts: list[tuple[Ids, bool]] = []
        before: Ids = []
        for piece in row:
            whole = next(encoded)
            goes_on = whole[: len(before)] == before
            parts.append((whole[len(before) :] if goes_on else _read(piece.text, tokenizer), piece.scored))
            before = whole
        found.append(parts)
    return found


def _read(text: str, tokenizer: PreTrainedTokenizerBase, framed: bool = False) -> Ids:
    return list(tokenizer(text, add_special_tokens=framed, verbose=False).input_ids)


def _start(turns: Turns, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """The start token, where the tokenizer puts one before a text; a chat template writes its own."""
    first = tokenizer("").input_ids[:1]
    return first if first == [tokenizer.bos_token_id] and not has_template(turns, tokenizer) else []


def _started(start: Ids, parts: list[tuple[Ids, bool]], every: bool) -> tuple[Ids, Ids]:
    """All tokens, the start token once before them, and of them those that are scored."""
    ids, learnt = [], []
    for tokens, scored in parts:
        ids += tokens
        learnt += tokens if scored or every else [UNSCORED] * len(tokens)
    return (ids, learnt) if ids[:1] == start else ([*start, *ids], [*([UNSCORED] * len(start)), *learnt])


def _length(parts: list[tuple[Ids, bool]], start: Sequence[int] = ()) -> int:
    return len(start) + sum(len(ids) for ids, _ in parts)


def _named(example: Dialogue) -> str:
    words = " ".join(" ".join(turn.content for turn in example.turns).split())
    return f"{f'row {example.row}' if example.row else 'the example'} ('{words[:60]}{'…' if len(words) > 60 else ''}')"


def _nothing_left(example: Dialogue, limit: int) -> UserError:
    return UserError(
        f"{_named(example)} has no token to learn among its first {limit}",
        "allow longer examples with max_length, or leave this one out",
    )
