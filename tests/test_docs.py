"""What is written from the code is current."""

from pathlib import Path

from deltatune.methods.describe import page

DOCS = Path(__file__).parent.parent / "docs"


def test_the_page_of_methods_is_current() -> None:
    assert (DOCS / "methods.md").read_text(encoding="utf-8") == page(), "run `make docs`"
