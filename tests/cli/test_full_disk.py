"""A full disk: one message that names the file, and nothing finished is lost."""

import resource
from contextlib import contextmanager

from command import assert_refused, deltatune


@contextmanager
def files_up_to(size):
    """Within the block no file grows above so many bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_stops_training_and_keeps_the_adapter_from_before(base, data, tmp_path):
    steps = ("--training", "batch_tokens=32")
    words = ("tune", "--base", base, "--data", data, "--method", "head", *steps, "--out", tmp_path)
    assert deltatune(*words).code == 0
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    with files_up_to(4096):
        done = deltatune(*words, "--seed", 1)
    assert_refused(done, f"could not write {tmp_path}/events.jsonl: File too large", "free some space")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_a_full_disk_refuses_the_adapter_in_words(base, data, tmp_path):
    with files_up_to(20_000):
        done = deltatune("tune", "--base", base, "--data", data, "--method", "full", "--out", tmp_path)
    assert_refused(done, f"could not write {tmp_path}/adapter", "free some space")
    assert not (tmp_path / "result.json").exists()
