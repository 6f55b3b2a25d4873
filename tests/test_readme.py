"""The README's commands and code run as they stand."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from command import Outcome, deltatune
from deltatune import METHODS, UserError, make, make_experiment, read_experiment
from deltatune.methods import parse
from deltatune.models.base import outline
from deltatune.models.count import count, count_on
from deltatune.models.places import find_base

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run_line(line: str) -> Outcome:
    """Runs one line of a shell in this process: `deltatune` with its words, given what an `echo` before it says."""
    said, _, command = line.rpartition("|")
    program, *words = shlex.split(command)
    echo, *text = shlex.split(said) or ["echo"]
    assert (program, echo) == ("deltatune", "echo"), f"of the shell these tests know no more than echo and |: {line}"
    return deltatune(*words, stdin=" ".join(text) + "\n" if said else "")


def test_the_commands_that_train_score_and_use_run_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    [commands] = blocks("bash")
    said = ""
    for line in commands.splitlines():
        done = run_line(line)
        assert done.code == 0, done.err
        said += done.out
    assert '"label": "fresh"' in said or '"label": "rotten"' in said


def test_the_code_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks("python"))  # each goes on from the one before
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert re.match(r"validation accuracy 0\.\d{3}", capsys.readouterr().out)


def test_the_table_of_methods_has_them_all_with_their_counts() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|.*\| ([\d,]+) \|$", README, re.MULTILINE)
    methods = [(*parse(words), int(written.replace(",", ""))) for words, written in rows]
    assert [name for name, *_ in methods] == [*METHODS]
    two_trained = {"parts": [{}, {}]}
    for name, options, written in methods:
        method = make(name, options or (two_trained if name == "adapterfusion" else {}))
        assert count(find_base("minilm"), method, labels=("no", "yes")).trainable == written


EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.yaml"))
OF_TRAINED_ADAPTERS = "adapterfusion.yaml"


@pytest.mark.parametrize(
    "file", [file for file in EXPERIMENTS if file.name != OF_TRAINED_ADAPTERS], ids=lambda f: f.name
)
def test_every_experiment_file_is_valid(file: Path) -> None:
    assert read_experiment(file, {}).cells()


def test_the_experiment_over_trained_adapters_asks_for_them() -> None:
    with pytest.raises(UserError, match="runs/fusion/first holds no adapter"):
        read_experiment(ROOT / "experiments" / OF_TRAINED_ADAPTERS, {})


CLAIMS = [file for file in EXPERIMENTS if file.parent.name == "claims"]


@pytest.mark.parametrize("file", CLAIMS, ids=lambda file: file.name)
def test_an_experiment_for_a_claim_says_what_is_claimed_and_what_is_tested(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# Claimed: ")
    assert any(line.startswith("# Tested here") for line in lines)
    assert read_experiment(file, {}).base in ("minilm", "smollm2"), "it runs without a hub"


@pytest.mark.parametrize("file", CLAIMS, ids=lambda file: file.name)
def test_an_experiment_for_a_claim_plans_its_cells_at_once(file: Path) -> None:
    """Dry: every method fits the base, and every method and seed is a cell of its own."""
    experiment = read_experiment(file, {})
    labels = ("no", "yes") if experiment.base == "minilm" else ()
    place = find_base(experiment.base)
    for choice in experiment.methods:
        counted = count_on(outline(place, labels=labels, storage=choice.storage), choice.make())
        assert counted.trainable > 0 or choice.method == "none"
    cells = experiment.cells(place.id, place.revision)
    assert len({cell.id for cell in cells}) == len(cells)
    assert {(cell.method.label, cell.seed, cell.data.train) for cell in cells} == {
        (choice.label, seed, size)
        for choice in experiment.methods
        for seed in experiment.seeds
        for size in experiment.data.sizes
    }


def test_there_is_an_experiment_for_every_claim_that_is_one() -> None:
    assert len(CLAIMS) == 9


def test_the_experiment_that_the_readme_shows_is_valid() -> None:
    [block] = blocks("yaml")
    experiment = make_experiment(yaml.safe_load(block))
    assert experiment.tuning is not None
    assert experiment.tuning.trials == 8
