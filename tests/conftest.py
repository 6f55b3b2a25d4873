"""Shapes in signatures are checked while testing; nothing is fetched from a hub."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # also of the processes that tests start: more threads than cores only wait
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # nothing here is compiled, and bitsandbytes would load the compiler

from importlib.util import find_spec
from pathlib import Path

from jaxtyping import install_import_hook

SOURCE = Path(find_spec("deltatune").origin).parent
SHAPED = [
    ("deltatune." + ".".join(path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
    for path in SOURCE.rglob("*.py")
    if "from jaxtyping import" in path.read_text(encoding="utf-8")
]
"""The modules with shapes in their signatures. The others are spared the checks, which take longer than their work."""

install_import_hook(SHAPED, "typecheck.check")

SLOW = ("test_readme.py", "test_interrupt.py", "test_loop.py", "test_compare.py")


def pytest_collection_modifyitems(items: list) -> None:
    """The files that take longest first, so that no worker is left with one of them alone at the end."""
    items.sort(key=lambda item: item.path.name not in SLOW)


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not look through its millions of objects again."""
    gc.collect()
    gc.freeze()
