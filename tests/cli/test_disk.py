"""A place that cannot be written to is one message that names it."""

import pytest

from command import assert_refused, deltatune


@pytest.mark.parametrize("command", ["tune", "compare"])
def test_an_output_folder_below_a_file_is_refused(base, data, tmp_path, command):
    (tmp_path / "file").write_text("")
    done = deltatune(command, "--base", base, "--data", data, "--method", "head", "--out", tmp_path / "file" / "out")
    assert_refused(done, f"could not write {tmp_path}/file/out", "another place")
