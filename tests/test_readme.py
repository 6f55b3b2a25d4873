"""The README's commands and code run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import deltatune
from deltatune import METHODS, load, make
from deltatune.models.attach import trainable_parameters

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def environment() -> dict[str, str]:
    """The commands of this environment first, so that `deltatune` is the one under test."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def test_the_commands_that_train_score_and_use_run_as_they_stand(tmp_path: Path, environment: dict[str, str]) -> None:
    [commands] = blocks("bash")
    done = subprocess.run(["bash", "-e", "-c", commands], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"label": "fresh"' in done.stdout or '"label": "rotten"' in done.stdout


def test_the_code_runs_as_it_stands(tmp_path: Path, environment: dict[str, str]) -> None:
    [code] = blocks("python")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.match(r"validation accuracy 0\.\d{3}", done.stdout)


def test_the_table_of_methods_has_them_all_with_their_counts() -> None:
    rows = dict(re.findall(r"^\| `([\w-]+)` \|.*\| ([\d,]+) \|$", README, re.MULTILINE))
    assert rows.keys() == METHODS.keys()
    for name, count in rows.items():
        model = deltatune.attach(load("minilm", labels=("no", "yes")).model, make(name))
        assert sum(p.numel() for p in trainable_parameters(model).values()) == int(count.replace(",", ""))


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda file: file.name)
def test_every_experiment_file_is_valid(file: Path) -> None:
    assert deltatune.read_experiment(file, {}).cells()
