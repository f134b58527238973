"""Files of this machine: hashed once, and written whole or not at all. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SETTLED_NS = 1_000_000_000
"""A file that was changed less than this before somebody looked may have been changed again within one tick of the
file system's clock; so may one whose time lies in the future, as after a clock was set back."""


@dataclass(frozen=True)
class Stamp:
    """What a file system says of a file without reading it.

    Attributes:
        size: size in bytes.
        mtime_ns: time of its last change, in nanoseconds.
        inode: the file's number on the disk: a copy with the size and the time of another file is told from it.
    """

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Return the stamp of a file.

        Raises:
            OSError: the file is not there.
        """
        found = path.stat()
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)

    def settled(self, now_ns: int) -> bool:
        """Tell whether it tells the file, as it was at this time, from every later state of it."""
        return self.mtime_ns <= now_ns - _SETTLED_NS


@dataclass(frozen=True)
class _Known:
    stamp: Stamp
    digest: str
    settled: bool


class Hashes:
    """SHA-256 of files, each of which is read once; a file with another stamp is another file."""

    def __init__(self) -> None:
        self._known: dict[Path, _Known] = {}

    def __call__(self, path: Path) -> str:
        """Return the SHA-256 of a file, in hexadecimal.

        Raises:
            OSError: the file cannot be read.
        """
        path, stamp = path.absolute(), Stamp.of(path)
        known = self._known.get(path)
        if known is None or known.stamp != stamp:
            settled = stamp.settled(time.time_ns())
            known = self._known[path] = _Known(stamp, sha256(path), settled)
        return known.digest

    def know(self, path: Path, stamp: Stamp, digest: str) -> None:
        """Take over a hash that was recorded earlier, with a settled stamp, if the file is still what it was then."""
        try:
            if Stamp.of(path) == stamp:
                self._known[path.absolute()] = _Known(stamp, digest, settled=True)
        except OSError:  # whoever needs the file will find out
            return

    def settled(self, path: Path) -> Stamp | None:
        """Return the stamp by which a hashed file can be known again; None: it was too new for that."""
        known = self._known.get(path.absolute())
        return known.stamp if known is not None and known.settled else None

    def changed(self, paths: Iterable[Path]) -> list[Path]:
        """Return those of the hashed files that are no longer what they were when they were hashed."""
        return [path for path in paths if self._has_changed(path)]

    def _has_changed(self, path: Path) -> bool:
        known = self._known.get(path.absolute())
        try:
            return known is not None and Stamp.of(path) != known.stamp
        except OSError:
            return True


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


def digest(data: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a JSON-able mapping, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Make a file that appears complete or not at all: write to the path that is given, with the same suffix.

    Raises:
        OSError: the disk refuses; a file that was there is as it was.
    """
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file that appears complete or not at all; errors are those of ``whole``."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Make a new folder that takes the place of ``target`` if the block ends well, and vanishes otherwise.

    What is in it is flushed to the disk first, so that a crash leaves the old folder or the new one.

    Yields:
        The folder, beside ``target``.

    Raises:
        OSError: the disk is full or refuses; ``target`` is as it was.
    """
    partial = target.with_name(f".{target.name}.partial")
    retired = target.with_name(f".{target.name}.partial-old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (p for p in partial.rglob("*") if p.is_file()):
            with path.open("rb+") as file:
                os.fsync(file)
        if target.exists():
            target.rename(retired)
        try:
            partial.rename(target)
        except OSError:
            if retired.exists():
                retired.rename(target)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(retired, ignore_errors=True)
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows has no handle of a folder, and needs none
        return
    descriptor = os.open(folder, os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finite(value: Any) -> Any:
    """Return a JSON-able value with null where a number is NaN or infinite, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
