"""The machine's memory, as far as this process may have it."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

_PROC, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available() -> int:
    """Return the bytes that this process can still take: what the machine has left, or its container if that is less.

    Files that the kernel only keeps for reading them again count as free.
    """
    return min([int(psutil.virtual_memory().available), *_left_in_containers()])


def release() -> None:
    """Give back to the system what was freed here; a process keeps it otherwise, in pieces that fit nothing larger.

    Takes milliseconds. Does nothing where the C library is not glibc.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _left_in_containers() -> Iterator[int]:
    """Yield what each control group around this process has left, of those that have a limit."""
    try:
        lines = _PROC.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = _CGROUPS, _V2
        elif "memory" in controllers.split(","):
            root, names = _CGROUPS / "memory", _V1
        else:
            continue
        # In a container the path may be the host's, of which only the root is mounted.
        folder = root / path.strip("/")
        for group in (folder, *folder.parents):
            yield from _left_in(group, *names)
            if group == root:
                break


def _left_in(group: Path, limit: str, usage: str, cached: str) -> Iterator[int]:
    try:
        most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # the root of all groups has no such files
        return
    if most != "max":
        yield max(0, int(most) - used + int(stat.get(cached, 0)))
