"""Adding tokens to a base: to its tokenizer and to its model."""

from collections.abc import Sequence

from tokenizers import AddedToken

from deltatune.errors import UserError
from deltatune.models.attach import attachments
from deltatune.models.base import Base
from deltatune.models.tokens import grow, new_tokens, refuse_others


def add_tokens(base: Base, texts: Sequence[str]) -> Base:
    """Makes each of `texts` one token of a language model, in place, before anything is attached; returns the base.

    The tokenizer knows them, the vocabulary grows, and the new vectors train with whatever is attached. Adding the
    same ones again changes nothing. Raises `UserError` for a text that is empty or a token already, for a classifier,
    and where other tokens were added or an adapter was attached before.
    """
    if base.task != "generation":
        raise UserError("new tokens need a language model", "load the base without labels")
    texts = tuple(dict.fromkeys(texts))
    known, there = base.tokenizer.get_vocab(), new_tokens(base.model)
    if not texts or (there is not None and there.texts == texts and known.keys() >= set(texts)):
        return base
    if there is None and attachments(base.model):
        raise UserError("an adapter is attached to this model, and would not train new tokens", "add them before")
    for text in texts:
        if not text.strip() or text in known:
            raise UserError(
                f"'{text}' cannot be added: it is {'a token already' if text.strip() else 'empty'}",
                "give words that the base has no token for, such as <tool>",
            )
    refuse_others(base.model, range(len(known), len(known) + len(texts)))
    base.tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts])
    grow(base.model, base.tokenizer.convert_tokens_to_ids(list(texts)), texts)
    return base
