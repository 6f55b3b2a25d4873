"""What is resident is read from the system, and free memory goes back to it."""

import platform
import subprocess
import sys

import pytest

from deltatune.training import memory

_HOLES = """
from deltatune.training.memory import give_back, resident
held = [bytearray(2**15) for _ in range(4000)]  # they lie in the heap, beside each other
last = held[1::20]
before = resident()
del held
kept = resident()
give_back()
print(before - kept, kept - resident())
"""


def test_the_highest_is_no_less_than_what_is_resident_now() -> None:
    assert memory.peak() >= memory.resident() > 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back when asked")
def test_what_is_free_between_things_that_are_kept_goes_back() -> None:
    printed = subprocess.run([sys.executable, "-c", _HOLES], check=True, capture_output=True, text=True).stdout
    freed, given_back = map(int, printed.split())
    assert given_back > 50e6 > freed


_KEPT = """
import sys
import torch
from deltatune.training.memory import MOST_KEPT, keep_freed, resident
assert keep_freed(int(sys.argv[1])) == (int(sys.argv[1]) > 0)
x = torch.ones(50_000_000)
assert x.untyped_storage().nbytes() == 200_000_000 < MOST_KEPT
held = resident()
del x
print(held - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps memory when asked")
@pytest.mark.parametrize(("most", "kept"), [(0, False), (10**9, True)], ids=["nothing", "a gigabyte"])
def test_what_is_freed_stays_where_that_is_asked_for(most: int, kept: bool) -> None:
    command = [sys.executable, "-c", _KEPT, str(most)]
    gone = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert gone < 1e6 if kept else gone > 150e6
