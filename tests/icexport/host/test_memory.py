"""What a process gives back."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from icexport.host import memory

GAPS = """
import psutil
from icexport.host import memory

def resident(): return psutil.Process().memory_info().rss / 1e6

blocks = [bytearray(100_000) for _ in range(2000)]
for block in blocks: block[:] = b"x" * len(block)
del blocks[:-1]  # the last one keeps glibc from shrinking its heap
before = resident()
memory.release()
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what is given back is glibc's")
def test_what_was_freed_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", GAPS], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 150, "megabytes"


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    memory.release()
