"""Learning curves: every method with several numbers of training examples, the smaller ones parts of the larger."""

import csv

import pytest

import deltatune
from deltatune.comparing.cell import read_data
from deltatune.comparing.experiment import make_experiment
from deltatune.errors import UserError
from runs import in_this_process, write_run


def test_every_method_runs_with_every_size_and_the_tables_are_of_the_largest(tmp_path):
    run = write_run(tmp_path, methods=["head"], seeds=[0], training={"epochs": 1})
    experiment = deltatune.read_experiment(tmp_path / "experiment.yaml", {"data": {"train": [16, 32]}})
    with in_this_process() as ran:
        done = deltatune.compare(experiment, run.folder)
    assert len(ran) == 2
    assert [result.train_examples for result in done.results] == [32]
    assert [result.train_examples for result in done.smaller] == [16]
    with (run.folder / "results.csv").open(encoding="utf-8", newline="") as file:
        assert sorted(int(line["train_examples"]) for line in csv.DictReader(file)) == [16, 32]
    small, large = (read_data(cell).train.texts for cell in reversed(experiment.cells()))
    assert (len(small), len(large)) == (16, 32)
    assert set(small) < set(large)


def test_two_sizes_that_are_all_of_the_data_are_refused_before_anything_runs(tmp_path):
    run = write_run(tmp_path, methods=["head"])
    experiment = deltatune.read_experiment(tmp_path / "experiment.yaml", {"data": {"train": [16, 64, 900]}})
    with pytest.raises(UserError, match="900 and 64 are the same: there are 64 training examples"):
        deltatune.compare(experiment, run.folder)
    assert not run.folder.exists()


def test_sizes_are_sorted_and_refused_where_they_are_none():
    experiment = make_experiment({"data": {"name": "rotten-tomatoes", "train": [800, 200, 800]}})
    assert [cell.data.train for cell in experiment.cells()][::3] == [800, 200]
    with pytest.raises(UserError, match=r"data\.train"):
        make_experiment({"data": {"name": "rotten-tomatoes", "train": [0, 200]}})
