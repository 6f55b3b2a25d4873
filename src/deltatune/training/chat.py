"""Talking with a language model, a saved adapter's or a bare base: turns that it remembers as far as it has room."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

from deltatune.data.dialogues import Dialogue, Dialogues, Turn
from deltatune.data.encode import prompts
from deltatune.data.tokens import length_limit
from deltatune.errors import UserError
from deltatune.models.base import Base, load
from deltatune.training.generation import Decoding, Ids, stream, virtual_tokens
from deltatune.training.precision import Computed, Precision, prepare, resolve
from deltatune.training.saved import open_adapter

_LONGEST = 8192
"""Tokens of a conversation where the model does not say how many it has positions for."""


class Chat:
    """A conversation. Of one that has become too long the oldest turns are forgotten, but not what the system says."""

    def __init__(self, base: Base, precision: Computed, decoding: Decoding, system: str = "") -> None:
        self.base = base
        self.precision = precision
        self.decoding = decoding
        self.system = [Turn("system", system, scored=False)] if system else []
        self.turns: list[Turn] = []
        self.limit = length_limit(base.tokenizer, base.model.config, _LONGEST, virtual_tokens(base.model))
        self.room = min(decoding.max_new_tokens, self.limit // 2)

    def reply(self, said: str, tell: Callable[[str], None]) -> str:
        """What the model answers; `tell` is given the text piece by piece, as it is written.

        Raises `UserError`, with nothing remembered of it, where the chat template cannot write the turn.
        """
        before = list(self.turns)
        self.turns.append(Turn("user", said, scored=False))
        decoding = self.decoding.model_copy(update={"seed": self.decoding.seed + len(before)})
        try:
            answer = stream(self.base.model, self.base.tokenizer, self._prompt(), tell, decoding, self.precision)
        except UserError:
            self.turns = before
            raise
        self.turns.append(Turn("assistant", answer.strip(), scored=False))
        return answer

    def reset(self) -> None:
        """Forgets every turn."""
        self.turns = []

    def _prompt(self) -> Ids:
        while len(self.turns) > 1 and len(self._tokens(10**9)) > self.limit - self.room:
            del self.turns[:2]
        return self._tokens(self.limit)

    def _tokens(self, limit: int) -> Ids:
        opened = Dialogue((*self.system, *self.turns, Turn("assistant", "…", scored=True)))
        both = bool(self.base.model.config.is_encoder_decoder)
        [ids] = prompts(Dialogues([opened]), self.base.tokenizer, limit=limit, encoder_decoder=both, room=self.room)
        return ids


def open_chat(
    folder: Path | None, decoding: Decoding, *, base: str = "", storage: str = "", precision: str = "", system: str = ""
) -> Chat:
    """A conversation with the adapter saved in `folder`, on its base or on `base`, or with the bare `base`.

    Raises `UserError` where neither is named, and for an adapter of a classifier.
    """
    if folder is None:
        if not base:
            raise UserError("there is nothing to talk with", "name an adapter's folder, or a base: --base smollm2")
        bare = load(base, storage=storage)
        computed = resolve(cast(Precision, precision or "auto"))
        bare.model.requires_grad_(False)  # so that all of it is stored as it is computed with
        prepare(bare.model, computed)
        return Chat(bare, computed, decoding, system)
    if storage:
        raise UserError("an adapter's base is stored as it was trained", "leave out --storage")
    ready = open_adapter(folder, base=base, precision=precision)
    if not ready.base.model.can_generate():
        raise UserError(f"{folder} labels texts and cannot talk", f"deltatune predict {folder}")
    return Chat(ready.base, ready.precision, decoding, system)
