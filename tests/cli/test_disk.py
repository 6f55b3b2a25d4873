"""A place that cannot be written to is one message that names it."""

import pytest
from filelock import FileLock

from command import assert_refused, deltatune


@pytest.mark.parametrize("command", ["tune", "compare"])
def test_an_output_folder_below_a_file_is_refused(base, data, tmp_path, command):
    (tmp_path / "file").write_text("")
    done = deltatune(command, "--base", base, "--data", data, "--method", "head", "--out", tmp_path / "file" / "out")
    assert_refused(done, f"could not write {tmp_path}/file/out", "another place")


def test_a_folder_that_another_comparison_writes_to_is_refused(base, data, tmp_path):
    with FileLock(tmp_path / ".lock"):
        done = deltatune("compare", "--base", base, "--data", data, "--method", "head", "--out", tmp_path)
    assert_refused(done, "another comparison is running in", "--out")
