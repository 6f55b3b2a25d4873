"""From words to parameters of the base, for selections: `embeddings`, `norms`, a role, or a regular expression."""

import re
from collections.abc import Sequence

from deltatune.errors import UserError, nearest
from deltatune.methods.contract import BaseParameter, Targets


def choose(method: str, entries: Targets, parameters: Sequence[BaseParameter]) -> set[BaseParameter]:
    """The parameters that the entries name, each a word or a regular expression for whole parts of a name.

    Parts are what dots divide: `layer.1` names all that is in that layer, and nothing of layer 11. Raises `UserError`
    for an entry that names nothing, with the nearest that would.
    """
    chosen: set[BaseParameter] = set()
    for entry in (entries,) if isinstance(entries, str) else entries:
        found = {parameter for parameter in parameters if entry in parameter.words}
        if not found:
            pattern = _stretch(method, entry)
            found = {parameter for parameter in parameters if any(map(pattern.fullmatch, parameter.names))}
        if not found:
            raise _nothing(method, entry, parameters)
        chosen |= found
    return chosen


def _stretch(method: str, entry: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(?:.*\.)?(?:{entry})(?:\..*)?")
    except re.error as error:
        raise UserError(
            f"{method}: '{entry}' is no valid regular expression: {error}", "a part of a name will do, such as layer.1"
        ) from error


def _nothing(method: str, entry: str, parameters: Sequence[BaseParameter]) -> UserError:
    words = sorted({word for parameter in parameters for word in parameter.words})
    names = [name for parameter in parameters for name in parameter.names]
    parts = dict.fromkeys(part for name in names for part in name.split(".") if not part.isdecimal())
    known = nearest(entry, [*words, *parts, *names])
    return UserError(
        f"{method}: '{entry}' names no parameter that it could train" if parameters else f"{method}: nothing is there",
        f"nearest: {', '.join(known)}; the head trains with every method",
    )
