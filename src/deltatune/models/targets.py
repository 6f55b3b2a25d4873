"""From words to layers: which linear layers `targets` names, and an error where a word names none."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn
from transformers import PreTrainedModel

from deltatune.errors import UserError
from deltatune.methods import Targets
from deltatune.models.roles import ALIASES, EMBEDDINGS, Role, embedding_roles, linear_roles, survey

ALL = "all-linear"


@dataclass(frozen=True)
class Matched:
    """What each entry of `targets` matched, in the order given."""

    entries: Mapping[str, tuple[str, ...]]

    @property
    def paths(self) -> list[str]:
        """Every matched module path, once."""
        return list(dict.fromkeys(path for paths in self.entries.values() for path in paths))

    def __str__(self) -> str:
        whole = tuple(entry for entry, paths in self.entries.items() if paths == (entry,))
        lines = [f"{entry}: {_counted(paths)}" for entry, paths in self.entries.items() if paths != (entry,)]
        return "\n".join(lines + ([_counted(whole)] if whole else []))


def adaptable(model: nn.Module, head: Iterable[str] = (), embeddings: bool = False) -> dict[str, Role]:
    """The layers that may be adapted, with their roles: the linear ones but the head and the output embedding.

    With `embeddings` the plain embeddings, too.
    """
    outside = (*head, *_vocabulary(model))
    roles = {**linear_roles(model), **(embedding_roles(model) if embeddings else {})}
    return {path: role for path, role in roles.items() if not below(path, outside)}


@survey
def _vocabulary(model: nn.Module) -> list[str]:
    """The paths of the output embedding."""
    layer = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return [path for path, module in model.named_modules() if module is layer and path]


def match(model: nn.Module, roles: Mapping[str, Role], targets: Targets) -> Matched:
    """Finds the layers among `roles` (see `adaptable`) that `targets` names.

    An entry is an alias (`all-linear`, `attention`, `mlp`, `embeddings`, …), a module name (the end of a path, such as
    `query` or `attention.output.dense`) or a regular expression for such an end. Raises `UserError` for an entry that
    matches nothing, with the nearest names that would.
    """
    entries = (targets,) if isinstance(targets, str) else tuple(targets)
    if not entries:
        raise UserError("targets is empty", f"name at least one, such as {ALL} or attention")
    return Matched({entry: _match(model, entry, roles) for entry in entries})


def below(path: str, parents: Collection[str]) -> bool:
    """Whether a module or parameter path is one of `parents` or lies inside one."""
    while path and path not in parents:
        path = path.rpartition(".")[0]
    return bool(path)


def within(path: str) -> list[str]:
    """A path and all that it lies inside of, the outermost first: `a.b` → `a`, `a.b`."""
    return [path[:end] for end, letter in enumerate(path) if letter == "."] + [path]


def _match(model: nn.Module, entry: str, roles: Mapping[str, Role]) -> tuple[str, ...]:
    if entry == ALL:
        found = tuple(path for path, role in roles.items() if role not in EMBEDDINGS)
    elif entry in ALIASES:
        found = tuple(path for path, role in roles.items() if role in ALIASES[entry])
    else:
        pattern = ending(entry)
        found = tuple(path for path in roles if pattern.fullmatch(path))
    if not found:
        raise _nothing(model, entry, roles)
    return found


def ending(entry: str) -> re.Pattern[str]:
    """The pattern of whole module paths that end in `entry`, a name or a regular expression."""
    try:
        return re.compile(rf"(?:.*\.)?(?:{entry})")
    except re.error as error:
        raise UserError(
            f"target '{entry}' is no valid regular expression: {error}", "a name alone will do, such as query"
        ) from error


def _nothing(model: nn.Module, entry: str, roles: Mapping[str, Role]) -> UserError:
    if entry in ALIASES:
        known = ", ".join(sorted(set(roles.values()))) or "none"
        return UserError(
            f"target '{entry}' matches no layer of this {type(model).__name__}",
            f"its linear layers have the roles: {known}; name modules instead, such as {_ends(roles)[:3]}",
        )
    others = [path for path, _ in model.named_modules() if path and ending(entry).fullmatch(path)]
    if others:
        return UserError(
            f"target '{entry}' matches no linear layer that can be adapted, only {others[0]}",
            f"linear layers end in: {', '.join(_ends(roles))}",
        )
    names = [ALL, *ALIASES, *_ends(roles)]
    close = get_close_matches(entry, names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}"
    if "," in entry:
        hint = f"several targets are written as a list: targets=[{entry}]"
    return UserError(f"target '{entry}' matches no layer", hint)


def _ends(roles: Mapping[str, Role]) -> list[str]:
    """The distinct last names of the linear layers, with the parent's where the last alone says little."""
    ends = (path.split(".") for path in roles)
    return list(dict.fromkeys(".".join(parts[-2:]) if parts[-1] == "dense" else parts[-1] for parts in ends))


def _counted(paths: tuple[str, ...]) -> str:
    """`12 layers: bert.encoder.layer.*.attention.self.query, …`: layers that differ by a number stand as one."""
    kinds = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", path) for path in paths)
    return f"{len(paths)} layer{'s' if len(paths) > 1 else ''}: {', '.join(kinds)}"
