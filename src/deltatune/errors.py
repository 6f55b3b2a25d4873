"""What a user did or gave that cannot work, said in one message with a hint."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Something only the user can mend: a wrong name, a bad file, a full disk.

    The command line prints it without a traceback and exits with code 1. `hint` says what to do about it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class DivergedError(UserError):
    """A run whose loss or gradient stopped being a number: its settings are no good."""


def nearest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known words most like `word`, the nearest first; all of them, in order, where none is like it."""
    known = list(dict.fromkeys(known))
    return get_close_matches(word, known, n=count, cutoff=0.5) or known[: 4 * count]


def unknown(kind: str, word: str, known: Iterable[str], instead: str = "") -> UserError:
    """The error for a name that is not among the known ones of its kind; `instead` says what else could be given."""
    known = list(known)
    close = get_close_matches(word, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}" if known else ""
    if instead:
        hint = f"{hint.rstrip('?')}; or {instead}" if hint else instead
    return UserError(f"there is no {kind} named '{word}'", hint)
