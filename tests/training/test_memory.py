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
