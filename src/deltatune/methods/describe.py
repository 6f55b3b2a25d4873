"""What can be said of a method from its class alone: for the command line and the docs."""

from typing import Any

from pydantic import TypeAdapter

from deltatune.errors import unknown
from deltatune.methods.registry import METHODS


def describe(name: str) -> dict[str, Any]:
    """A method's name, title, family, paper, summary, whether it merges, and its options with defaults and help."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    kind = METHODS[name]
    fields = TypeAdapter(kind).json_schema().get("properties", {})
    return {
        "name": kind.name,
        "title": kind.title,
        "family": kind.kind,
        "paper": kind.paper,
        "summary": (kind.__doc__ or "").strip().splitlines()[0],
        "merges": f"no: {why}" if (why := getattr(kind, "unmergeable", "")) else "yes",
        "file": kind.peft_type,
        "learning_rate": kind.learning_rate,
        "options": [
            {"name": field, "default": schema.get("default"), "help": schema.get("description", "")}
            for field, schema in fields.items()
        ],
    }


def describe_all() -> list[dict[str, Any]]:
    """Every registered method."""
    return [describe(name) for name in METHODS]
