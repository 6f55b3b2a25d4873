"""Tables from the user's own files: CSV, TSV, JSON lines, JSON and Parquet, in UTF-8 with or without a BOM."""

import csv
import hashlib
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deltatune.data.source import Source, last_cause, quiet_datasets, split_roles
from deltatune.errors import UserError, unknown
from deltatune.files import sha256

if TYPE_CHECKING:
    from datasets import Dataset

# The endings that are read, and the reader in `datasets` for each.
READERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
ENDINGS = ", ".join(READERS)
# How the warning of pandas begins when it cuts off what a row has too much.
CUT_OFF = "Length of header or names"


def looks_like_path(name: str) -> bool:
    """Whether someone who writes this name means a file or folder, even where none is there."""
    return name.startswith((".", "/", "~")) or name.endswith("/") or Path(name).suffix.lower() in READERS


def no_such_path(path: Path) -> UserError:
    """The error for a path where nothing is, with the names most like it."""
    beside = [file for file in path.parent.glob("*") if file.is_dir() or file.suffix.lower() in READERS]
    return unknown("file or folder", str(path), sorted(str(file) for file in beside))


def read_path(path: Path) -> Source:
    """The tables in a file, or in a folder with a file for each split.

    The revision is the SHA-256 of the file, or of the digests of all files read.
    Raises UserError that names the file which is of no known kind, damaged, empty or not in UTF-8.
    """
    files = _split_files(path) if path.is_dir() else {"train": path}
    tables, digests = {}, {}
    for split, file in files.items():
        tables[split], digests[split] = _read_file(file)
    if path.is_dir():
        listed = "".join(f"{split} {digest}\n" for split, digest in sorted(digests.items()))
        return Source(tables, f"sha256:{hashlib.sha256(listed.encode()).hexdigest()}")
    return Source(tables, f"sha256:{digests['train']}")


def _split_files(folder: Path) -> dict[str, Path]:
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in READERS)
    by_stem = {file.stem: file for file in files}
    if len(by_stem) < len(files):
        twice = next(file.stem for file in files if by_stem[file.stem] != file)
        raise UserError(f"{folder} has more than one file named {twice}", "keep one of them, or name the file itself")
    roles = split_roles(by_stem)
    if "train" not in roles:
        names = ", ".join(file.name for file in files) or "nothing of the kind"
        raise UserError(
            f"{folder} has no training file; found: {names}",
            f"name the files train, validation and test (ending in {ENDINGS}), or give one file",
        )
    return {split: by_stem[stem] for split, stem in roles.items()}


def _read_file(path: Path) -> tuple["Dataset", str]:
    """The table in a file, in memory, and the SHA-256 of what was read."""
    from datasets import load_dataset

    ending = path.suffix.lower()
    if ending not in READERS:
        raise UserError(f"{path} is of no kind that is read here", f"give a file ending in {ENDINGS}")
    # Read from a copy in a folder of its own: `datasets` takes * and [ in a path for a pattern, and a cache that ends
    # with this block cannot go stale. What is read is also exactly what is hashed.
    with quiet_datasets(), tempfile.TemporaryDirectory(prefix="deltatune-") as folder, warnings.catch_warnings():
        copy = Path(folder) / f"data{ending}"
        try:
            shutil.copyfile(path, copy)
        except OSError as error:
            raise UserError(f"could not read {path}: {error.strerror or error}") from error
        if not copy.stat().st_size:
            raise UserError(f"{path} is empty")
        warnings.filterwarnings("error", message=CUT_OFF)
        options: dict[str, Any] = {"data_files": str(copy), "cache_dir": folder, "keep_in_memory": True}
        try:
            if READERS[ending] == "csv":
                options |= _csv_options(copy)
            return load_dataset(READERS[ending], split="train", **options), sha256(copy)
        except UserError as error:
            raise UserError(f"{path}: {error.message}", error.hint) from error
        except Exception as error:  # whatever pandas, pyarrow and `datasets` raise for a file that they cannot read
            raise _unreadable(path, error) from error


def _csv_options(path: Path) -> dict[str, Any]:
    """How to read a table in CSV or TSV: every cell as a string, so that nobody guesses what NA, 007 or 1e5 mean."""
    from datasets import Features, Value

    tabs = path.suffix == ".tsv"
    # In TSV a quotation mark is a letter like any other; read otherwise, one that stands alone swallows rows.
    quoting: Literal[0, 3] = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file, delimiter="\t" if tabs else ",", quoting=quoting), [])
    names = [name.strip() or f"column {place}" for place, name in enumerate(header, 1)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two columns are named '{twice[0]}'", "the first line must give each column a name of its own")
    return {
        "sep": "\t" if tabs else ",",
        "quoting": quoting,
        "column_names": names,
        "header": 0,
        "index_col": False,
        "keep_default_na": False,
        "na_values": [""],
        "features": Features({name: Value("string") for name in names}),
    }


def _unreadable(path: Path, error: Exception) -> UserError:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UnicodeDecodeError):
            return UserError(f"{path} is not in UTF-8: {cause.reason} at byte {cause.start}", "save it as UTF-8")
        cause = cause.__cause__
    if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
        return UserError(f"{path} holds no rows")
    what = last_cause(error)
    if what.startswith(CUT_OFF):
        what = "a row has more cells than the first line"
    hint = "a text with a comma in it needs quotation marks around it" if path.suffix.lower() == ".csv" else ""
    return UserError(f"{path} could not be read: {what}", hint)
