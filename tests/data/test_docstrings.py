import ast
import platform

import pytest

from deltatune.data import load_data
from deltatune.data.docstrings import INSTRUCTION, docstrings
from deltatune.errors import UserError


@pytest.fixture(scope="module")
def data():
    return load_data("docstrings")


def pairs(part):
    """The sources and the lines of a split."""
    return [(example.turns[0].content.removeprefix(f"{INSTRUCTION}\n\n"), example.turns[1].content)
            for example in part.examples]  # fmt: skip


def test_the_functions_are_divided_about_eighty_ten_ten(data):
    sizes = [len(data.train), len(data.validation), len(data.test)]
    assert sum(sizes) > 1000
    assert all(0.05 < size / sum(sizes) < 0.2 for size in sizes[1:])


def test_each_is_a_function_without_its_docstring_and_the_line_that_it_lost(data):
    for part in (data.train, data.validation, data.test):
        for source, line in pairs(part):
            (function,) = ast.parse(source).body
            assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            assert 40 <= len(source) <= 300
            assert 4 <= len(line.split()) <= 20
            assert line.endswith(".")
    turns = data.test.examples[0].turns
    assert [(turn.role, turn.scored) for turn in turns] == [("user", False), ("assistant", True)]


def test_no_answer_and_no_source_of_one_split_stands_in_another(data):
    parts = [pairs(part) for part in (data.train, data.validation, data.test)]
    for each in (0, 1):
        met = [" ".join(pair[each].lower().split()) for part in parts for pair in part]
        if each:
            assert len(met) == len(set(met))
        assert not {*met[: len(parts[0])]} & {*met[len(parts[0]) :]}


def test_it_says_where_it_is_from(data):
    assert data.revision.startswith(f"Python {platform.python_version()}, sha256 ")
    assert (data.name, data.task, data.labels) == ("docstrings", "generation", ())
    assert "no module is in two splits" in data.splitting


MODULE = (
    '''
class Shelf:
    """Holds books."""

    @property
    def books(self, name):
        """Return all books of this name.

        More words.
        """
        found = self._all  # a comment
        return found[name]

    def titles(self): """Return the titles of all books."""; return [book.title for book in self.books]

    def short(self):
        """Return the number of books."""
        return 1

    def sign(self, name):
        """sign(name) -> the books of this name."""
        return self.books[name] or self.others[name]

    def cut(self, name):
        """Return all books of this name, but also of
        others."""
        return self.books[name] or self.others[name]

    def bare(self, name, others):
        """Return all the books that there are of this name."""

    def long(self, name):
        """Return every book twice, as it was asked for."""
        return ['''
    + "self.books[name], " * 30
    + ''']

async def borrow(shelf, name):
    """Take a book off the shelf."""
    def inner():
        """Return the book that was asked for."""
        return shelf.books[name]
    return await inner()
'''
)


def test_what_is_taken_of_a_module_and_what_is_left(monkeypatch, tmp_path):
    (tmp_path / "shelves.py").write_text(MODULE)
    (tmp_path / "later.py").write_text(MODULE.replace("all books", "ALL BOOKS").replace("a book", "one book", 1))
    (tmp_path / "broken.py").write_text("def")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "other.py").write_text(MODULE.replace("books", "tests"))
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    found = docstrings.__wrapped__()
    assert found == docstrings.__wrapped__()
    inner = '    def inner():\n        """Return the book that was asked for."""\n        return shelf.books[name]\n'
    assert [pair for part in (found.train, found.validation, found.test) for pair in pairs(part)] == [
        (
            "def books(self, name):\n    found = self._all  # a comment\n    return found[name]",
            "Return ALL BOOKS of this name.",
        ),
        (f"async def borrow(shelf, name):\n{inner}    return await inner()", "Take one book off the shelf."),
    ]
    assert found.duplicates == 2


def test_its_columns_and_prompts_are_fixed():
    with pytest.raises(UserError, match="the columns of 'docstrings' are fixed"):
        load_data("docstrings", label="docstring")
    with pytest.raises(UserError, match="the prompts of 'docstrings' are fixed"):
        load_data("docstrings", system="Be brief.")
    with pytest.raises(UserError, match="'docstrings' is for generation, not for classification"):
        load_data("docstrings", task="classification")


def test_a_python_without_sources_is_told_apart(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match="no sources of the standard library"):
        docstrings.__wrapped__()
