"""What can be said of a method from its code alone: for the command line and for docs/methods.md."""

import inspect
import json
import sys
from typing import Any

from pydantic import TypeAdapter

from deltatune.errors import unknown
from deltatune.methods.registry import METHODS, options_of


def describe(name: str) -> dict[str, Any]:
    """A method's name, title, family, paper, summary, whether it merges, its file form, and options with help."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    kind = METHODS[name]
    help_of = TypeAdapter(kind).json_schema().get("properties", {})
    return {
        "name": kind.name,
        "title": kind.title,
        "family": kind.kind,
        "paper": kind.paper,
        "summary": (kind.__doc__ or "").strip().splitlines()[0],
        "merges": f"no: {why}" if (why := getattr(kind, "unmergeable", "")) else "yes",
        "file": kind.peft_type,
        "keys": [name for keys in ("suffixes", "shared_suffixes", "keys") for name in getattr(kind, keys, ())],
        "learning_rate": kind.learning_rate,
        "options": [
            {"name": option, "default": value, "help": " ".join(help_of[option].get("description", "").split())}
            for option, value in options_of(kind()).items()
        ],
    }


def describe_all() -> list[dict[str, Any]]:
    """Every registered method."""
    return [describe(name) for name in METHODS]


def page() -> str:
    """The text of docs/methods.md: every method with its formula, options and file form."""
    return "\n".join([_INTRODUCTION, *map(_section, METHODS)])


_INTRODUCTION = """\
# The methods

Written from the code by `make docs`; the tests check that it is current. `deltatune methods --base BASE` counts their
parameters on a base of yours. On a command line a method is written with its options: `lora:rank=16,targets=attention`.
"""


def _section(name: str) -> str:
    method = describe(name)
    source = inspect.getdoc(sys.modules[METHODS[name].__module__]) or ""
    paper = method["paper"] or "none to name"
    lines = [
        f"## {method['title']}: `{name}`",
        "",
        method["summary"],
        "",
        "```text",
        source.strip(),
        "```",
        "",
        f"- Family: {method['family']}. Source: {paper}. Merges into the base: {method['merges']}.",
        f"- Learning rate to start from: {method['learning_rate']:g}.",
        f"- File: type `{method['file']}`" + (f", keys {_code(method['keys'])}." if method["keys"] else "."),
        "",
    ]
    if method["options"]:
        lines += ["| Option | Default | What it does |", "|---|---|---|"]
        lines += [
            f"| `{option['name']}` | `{json.dumps(option['default'])}` | {option['help'].replace('|', chr(92) + '|')} |"
            for option in method["options"]
        ]
        lines.append("")
    return "\n".join(lines)


def _code(words: list[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)
