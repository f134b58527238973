"""The memory of this process."""

from __future__ import annotations

import ctypes
import sys


def release() -> None:
    """Give back to the system what was freed here; a process keeps it otherwise, in pieces that fit nothing larger.

    Takes milliseconds. Does nothing where the C library is not glibc.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
