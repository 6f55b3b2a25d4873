"""Runs of one experiment from several machines become one; others are refused by what differs."""

import json
import shutil

import pytest
import yaml

from command import deltatune
from deltatune.comparing.joining import join
from deltatune.comparing.results import CellResult
from deltatune.errors import UserError
from deltatune.files import write_json
from runs import in_this_process, write_run


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """The same experiment with two seeds on one machine and another seed on a second."""
    place = tmp_path_factory.mktemp("place")
    run = write_run(place, methods=["head", "bitfit"], training={"epochs": 1, "batch_tokens": 256})
    with in_this_process():
        assert run.start("--seed", 0, "--seed", 1, "--out", place / "a").code == 0
        assert run.start("--seed", 2, "--seed", 1, "--method", "head", "--out", place / "b").code == 0
    return place


@pytest.fixture(scope="module")
def joined(apart):
    """Both as one, in the folder `whole`."""
    return deltatune("merge-runs", apart / "a", apart / "b", "--out", apart / "whole", "--json")


def test_the_whole_has_every_cell_once_and_its_own_report(apart, joined):
    done, whole = joined, apart / "whole"
    assert done.code == 0
    records = json.loads(done.out)
    assert [(one["label"], one["seed"]) for one in records] == [
        ("head", 0), ("head", 1), ("head", 2), ("bitfit", 0), ("bitfit", 1),
    ]  # fmt: skip
    for record in records:
        [result] = (whole / "cells").glob(f"{record['label']}-seed{record['seed']}-*/result.json")
        assert CellResult.model_validate_json(result.read_text()).quality == record["accuracy"]
    written = yaml.safe_load((whole / "experiment.yaml").read_text())
    assert written["seeds"] == [0, 1, 2]
    assert len(written["resolved"]["machine"]) == 2
    assert "report.html" in done.err
    assert (whole / "report.html").is_file()


def test_what_is_joined_can_be_gone_on_with(apart, joined):
    assert joined.code == 0
    with in_this_process() as ran:
        done = deltatune("compare", apart / "whole" / "experiment.yaml", "--out", apart / "whole")
    assert done.code == 0
    assert [name[:12] for name in ran] == ["bitfit-seed2"]


def other(apart, tmp_path, change):
    """The second run with something changed in its experiment.yaml."""
    folder = shutil.copytree(apart / "b", tmp_path / "b")
    content = yaml.safe_load((folder / "experiment.yaml").read_text())
    change(content)
    (folder / "experiment.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("resolved", "data", "revision"), "sha256:0", "data.revision"),
        (("resolved", "code"), "0.1.0-000000000000", "code is"),
        (("resolved", "versions", "torch"), "1.0", "versions is"),
        (("training", "epochs"), 3.0, "training is"),
        (("methods", 0, "learning_rate"), 0.5, "the method 'head' is"),
    ],
)
def test_runs_that_differ_are_refused_by_what_does(apart, tmp_path, path, value, says):
    def change(content):
        *way, last = path
        for key in way:
            content = content[key]
        content[last] = value

    with pytest.raises(UserError, match="are not of one experiment") as refused:
        join([apart / "a", other(apart, tmp_path, change)], tmp_path / "whole")
    assert says in refused.value.message
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize(
    ("file", "path", "says"),
    [
        ("result.json", ("code",), "were run by other code"),
        ("result.json", ("test_digest",), "were tested on other examples"),
        ("adapter/deltatune.json", ("base", "fingerprint"), "bases with other weights"),
    ],
)
def test_cells_of_other_code_examples_or_weights_are_refused(apart, tmp_path, file, path, says):
    folder = shutil.copytree(apart / "b", tmp_path / "b")
    [cell] = (folder / "cells").glob("head-seed2-*")
    whole = content = json.loads((cell / file).read_text())
    *way, last = path
    for key in way:
        content = content[key]
    content[last] = "another"
    write_json(cell / file, whole)
    with pytest.raises(UserError, match=says):
        join([apart / "a", folder], tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_what_is_no_run_or_would_be_overwritten_is_refused(apart, tmp_path):
    for folders, out, says in (
        ([apart / "a", tmp_path], tmp_path / "whole", "is no run"),
        ([apart / "a"], tmp_path / "whole", "nothing to join"),
        ([apart / "a", apart / "b"], apart / "a", "is no empty folder"),
    ):
        with pytest.raises(UserError, match=says):
            join(folders, out)
