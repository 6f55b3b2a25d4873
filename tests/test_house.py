"""The house: a room imports only from rooms above it, and the public names are what is documented."""

import ast
from pathlib import Path

import pytest

import deltatune

SOURCE = Path(deltatune.__file__).parent
ROOMS = ("weights", "methods", "models", "data", "scoring", "training", "planning", "comparing", "serving", "cli")
GROUND = {"dropout", "errors", "files", "kernels", "packages", "words"}
"""Modules that every room may use; they use no room."""


def imports(path: Path) -> set[str]:
    """The first names below `deltatune` that a module imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [
                f"{node.module}.{alias.name}" if node.module == "deltatune" else node.module or ""
                for alias in node.names
            ]
        found |= {name.split(".")[1] for name in names if name.startswith("deltatune.")}
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_room_imports_only_from_rooms_above_it(path: Path) -> None:
    place = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if place == "__init__":
        return
    allowed = GROUND | set(ROOMS[: ROOMS.index(place) + 1] if place in ROOMS else ())
    assert imports(path) <= allowed


def test_every_folder_is_a_room_of_the_house() -> None:
    assert {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"} <= {*ROOMS, *GROUND}


@pytest.mark.parametrize("name", deltatune.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert name in dir(deltatune)
    assert getattr(deltatune, name).__doc__


def test_peft_is_a_peer_and_never_imported() -> None:
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [module for module in modules if module.split(".")[0] in ("peft", "pickle")], path
