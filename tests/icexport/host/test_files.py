"""Hashes by stamp, and files and folders that appear whole."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path

import pytest

from icexport.host import files
from icexport.host.files import Hashes, Stamp, finite, replacing, sha256, whole, write_whole

HOUR_NS = 3600 * 10**9


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read to be hashed."""
    found: list[str] = []

    def counted(path: Path) -> str:
        found.append(path.name)
        return sha256(path)

    monkeypatch.setattr(files, "sha256", counted)
    return found


def aged(path: Path, text: str, by_ns: int = HOUR_NS) -> Path:
    """A file that was written so long ago."""
    path.write_text(text)
    then = time.time_ns() - by_ns
    os.utime(path, ns=(then, then))
    return path


def test_sha256(tmp_path: Path) -> None:
    content = os.urandom((1 << 20) + 7)
    (tmp_path / "a").write_bytes(content)
    assert sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_a_file_is_read_once_until_it_changes(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, hashes = aged(tmp_path / "a", "one"), Hashes()
    first = hashes(path)
    monkeypatch.chdir(tmp_path)
    assert hashes(Path("a")) == first, "another way to say where it is"
    assert reads == ["a"]
    aged(path, "two", 2 * HOUR_NS)
    assert hashes(path) != first
    assert reads == ["a", "a"]


def test_a_copy_with_the_same_size_and_time_is_another_file(tmp_path: Path, reads: list[str]) -> None:
    path, hashes = aged(tmp_path / "a", "one"), Hashes()
    stamp = Stamp.of(path)
    hashes(path)
    other = tmp_path / "b"
    other.write_text("two")
    os.utime(other, ns=(stamp.mtime_ns, stamp.mtime_ns))
    other.replace(path)
    assert hashes(path) == hashlib.sha256(b"two").hexdigest()


def test_recorded_hashes_are_taken_over_while_the_stamp_holds(tmp_path: Path, reads: list[str]) -> None:
    path = aged(tmp_path / "a", "one")
    recorded = Hashes()
    digest, stamp = recorded(path), recorded.settled(path)
    assert stamp is not None
    reads.clear()

    hashes = Hashes()
    hashes.know(path, stamp, digest)
    assert (hashes(path), reads) == (digest, [])
    aged(path, "two", HOUR_NS + 10**7)
    hashes = Hashes()
    hashes.know(path, stamp, digest)
    assert hashes(path) != digest
    path.unlink()
    Hashes().know(path, stamp, digest)


@pytest.mark.parametrize(("age_ns", "settled"), [(0, False), (9 * 10**8, False), (2 * 10**9, True), (-HOUR_NS, False)])
def test_what_was_just_changed_or_comes_from_the_future_is_not_recorded(
    tmp_path: Path, age_ns: int, settled: bool
) -> None:
    path, hashes = aged(tmp_path / "a", "one", age_ns), Hashes()
    assert hashes.settled(path) is None, "not hashed yet"
    hashes(path)
    assert (hashes.settled(path) is not None) is settled


def test_what_changed_since_it_was_hashed_is_told(tmp_path: Path) -> None:
    paths = [aged(tmp_path / name, "one") for name in "abcd"]
    hashes = Hashes()
    for path in paths[:3]:
        hashes(path)
    assert hashes.changed(paths) == []
    aged(paths[0], "other text")
    paths[1].unlink()
    aged(paths[3], "never hashed")
    assert hashes.changed(paths) == paths[:2]


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_whole(path, "old")
    with contextlib.suppress(KeyError), whole(path) as partial:
        assert partial.suffix == ".npz"
        partial.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    with whole(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]
    assert path.read_text() == "new"


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    with replacing(target) as folder:
        (folder / "a").write_text("old")
    with contextlib.suppress(OSError), replacing(target) as folder:
        (folder / "a").write_text("half")
        raise OSError("the disk is full")
    assert (target / "a").read_text() == "old"
    with replacing(target) as folder:
        (folder / "b").write_text("new")
    assert [p.name for p in target.iterdir()] == ["b"]

    rename = Path.rename

    def failing(self: Path, other: Path) -> Path:
        if other == target and self.name == ".model.partial":
            raise OSError("Input/output error")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", failing)
    with contextlib.suppress(OSError), replacing(target) as folder:
        (folder / "c").write_text("newest")
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_numbers_that_json_lacks_become_null() -> None:
    assert finite({"a": [1.0, float("nan")], "b": (float("inf"), "x", None)}) == {
        "a": [1.0, None],
        "b": [None, "x", None],
    }
