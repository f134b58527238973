"""The engine store: built once, shared by links, collected when nothing refers to it, never half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from icexport.bundle.engine_store import EngineStore
from icexport.bundle.manifest import MANIFEST_NAME, SCHEMA_VERSION
from icexport.errors import BundleError, DamagedBundleError

KEY = "ab" * 32
OTHER = "cd" * 32


@pytest.fixture
def store(tmp_path: Path) -> EngineStore:
    return EngineStore(tmp_path / "store")


class Maker:
    """Writes one file, and counts how often it had to."""

    def __init__(self, text: str = "plan") -> None:
        self.calls, self._text = 0, text

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "engine.plan").write_bytes(self._text.encode())


def test_an_engine_is_built_once_and_shared(store: EngineStore, tmp_path: Path) -> None:
    make = Maker()
    assert store.fetch(KEY, tmp_path / "canny", make) is False
    assert store.fetch(KEY, tmp_path / "depth", make) is True
    assert make.calls == 1
    one, two = (tmp_path / name / "engine.plan" for name in ("canny", "depth"))
    assert one.read_text() == two.read_text() == "plan"
    assert one.samefile(two)
    assert [p.name for p in (tmp_path / "canny").iterdir()] == ["engine.plan"]


def test_another_key_is_another_engine(store: EngineStore, tmp_path: Path) -> None:
    store.fetch(KEY, tmp_path / "one", Maker("one"))
    store.fetch(OTHER, tmp_path / "two", Maker("two"))
    assert (tmp_path / "two" / "engine.plan").read_text() == "two"


def test_a_disk_without_links_gets_copies(store: EngineStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    store.fetch(KEY, tmp_path / "bundle", Maker())
    assert (tmp_path / "bundle" / "engine.plan").stat().st_nlink == 1


def test_a_failed_build_leaves_nothing(store: EngineStore, tmp_path: Path) -> None:
    def crash(folder: Path) -> None:
        (folder / "engine.plan").write_text("half")
        raise RuntimeError("the builder crashed")

    with pytest.raises(RuntimeError, match="crashed"):
        store.fetch(KEY, tmp_path / "bundle", crash)
    assert not (tmp_path / "bundle").exists()
    assert [p for p in store.root.rglob("*") if p.is_file() and p.suffix != ".lock"] == []
    assert store.fetch(KEY, tmp_path / "bundle", Maker()) is False


@pytest.mark.parametrize("damage", ["change", "remove", "add", "no hashes"])
def test_a_damaged_engine_is_built_again(store: EngineStore, tmp_path: Path, damage: str) -> None:
    store.fetch(KEY, tmp_path / "first", Maker())
    folder = store.root / "engines" / KEY
    plan = folder / "engine.plan"
    if damage == "change":
        plan.write_text("other")
    elif damage == "remove":
        plan.unlink()
    elif damage == "add":
        (folder / "more").touch()
    else:
        (folder / "hashes.json").unlink()
    again = Maker("again")
    assert store.fetch(KEY, tmp_path / "second", again) is False
    assert (again.calls, (tmp_path / "second" / "engine.plan").read_text()) == (1, "again")
    assert store.fetch(KEY, tmp_path / "third", again) is True


def test_two_builders_of_one_key(store: EngineStore, tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()
    hits: dict[str, bool] = {}

    def slow(folder: Path) -> None:
        begun.set()
        assert go_on.wait(10)
        Maker("first")(folder)

    second = Maker("second")
    threads = [
        threading.Thread(target=lambda: hits.update(one=store.fetch(KEY, tmp_path / "one", slow))),
        threading.Thread(target=lambda: hits.update(two=store.fetch(KEY, tmp_path / "two", second))),
    ]
    threads[0].start()
    assert begun.wait(10)
    threads[1].start()
    threads[1].join(0.3)
    assert threads[1].is_alive()
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert hits == {"one": False, "two": True}
    assert second.calls == 0


def bundle_of(path: Path, *keys: str) -> Path:
    """The least that is a bundle with these engines."""
    engine = {"graph": "unet", "backend": "tensorrt-rtx", "version": "1.7"}
    size = {"min": 1, "opt": 1, "max": 1}
    names = ("condition", "source", "graphs", "configs", "files", "tolerances", "parity", "versions")
    manifest = {"schema_version": SCHEMA_VERSION, "key": "k", "dtype": "fp16", "opset": 21, "fidelity": None}
    manifest |= {name: {} for name in names}
    manifest |= {"profile": dict.fromkeys(("batch", "height", "width"), size), "engines": dict.fromkeys(keys, engine)}
    path.mkdir()
    (path / MANIFEST_NAME).write_text(json.dumps(manifest))
    return path


def test_collect_keeps_what_a_bundle_refers_to(store: EngineStore, tmp_path: Path) -> None:
    for key in (KEY, OTHER):
        store.fetch(key, tmp_path / key, Maker())
    bundle = bundle_of(tmp_path / "canny", KEY)
    store.register(bundle)
    (found,) = store.collect(dry_run=True)
    assert (found.key, found.reason) == (OTHER, "no bundle refers to it")
    assert (store.root / "engines" / OTHER).is_dir()
    assert store.collect() == [found]
    assert not (store.root / "engines" / OTHER).exists()
    assert store.collect() == []
    (bundle / MANIFEST_NAME).unlink()
    assert [row.key for row in store.collect()] == [KEY]
    assert list((store.root / "bundles").iterdir()) == []


SHARED, CANNY, DEPTH, UNUSED = ("12" * 32, "34" * 32, "56" * 32, "78" * 32)
NEEDED = {"canny": {SHARED, CANNY}, "depth": {SHARED, DEPTH}}


@pytest.fixture
def two_bundles(store: EngineStore, tmp_path: Path) -> EngineStore:
    """Two registered bundles that share an engine, and an engine that neither has; all with compiled kernels."""
    (store.root / "kernels").mkdir(parents=True)
    for key in (SHARED, CANNY, DEPTH, UNUSED):
        store.fetch(key, tmp_path / "built" / key, Maker(key))
        (store.root / "kernels" / f"{key}.cache").write_text("kernels")
    for name, keys in NEEDED.items():
        store.register(bundle_of(tmp_path / name, *keys))
        for key in keys:
            store.fetch(key, tmp_path / name / "engines" / key, Maker())
    return store


def kept(store: EngineStore) -> set[str]:
    """What can still be had without building it, with its kernels."""
    plans = {p.parent.name for p in (store.root / "engines").glob("[!.]*/engine.plan") if p.read_text()}
    assert plans == {path.stem for path in (store.root / "kernels").iterdir()}
    return plans


def test_collect_keeps_what_any_of_two_bundles_needs(two_bundles: EngineStore) -> None:
    assert {row.key for row in two_bundles.collect(dry_run=True)} == {UNUSED}
    assert kept(two_bundles) == {SHARED, CANNY, DEPTH, UNUSED}
    assert {row.key for row in two_bundles.collect()} == {UNUSED}
    assert kept(two_bundles) == {SHARED, CANNY, DEPTH}
    assert two_bundles.collect() == []


@pytest.mark.parametrize(("deleted", "left"), [("canny", "depth"), ("depth", "canny")])
def test_collect_keeps_what_the_other_bundle_needs(
    two_bundles: EngineStore, tmp_path: Path, deleted: str, left: str
) -> None:
    two_bundles.collect()
    shutil.rmtree(tmp_path / deleted)
    own = NEEDED[deleted] - {SHARED}
    for _ in range(2):
        assert {row.key for row in two_bundles.collect(dry_run=True)} == own
        assert kept(two_bundles) == {SHARED, CANNY, DEPTH}
    assert {row.key for row in two_bundles.collect()} == own
    assert kept(two_bundles) == NEEDED[left]
    for key in NEEDED[left]:
        assert (tmp_path / left / "engines" / key / "engine.plan").read_text() == key
        assert two_bundles.fetch(key, tmp_path / "again" / key, Maker()) is True
    assert two_bundles.collect() == []
    shutil.rmtree(tmp_path / left)
    assert {row.key for row in two_bundles.collect()} == NEEDED[left]
    assert kept(two_bundles) == set()


def test_collect_only_tells_when_asked_to(two_bundles: EngineStore, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "depth")
    (two_bundles.root / "engines" / CANNY / "more").touch()
    before = sorted(two_bundles.root.rglob("*"))
    told = two_bundles.collect(dry_run=True)
    assert sorted(two_bundles.root.rglob("*")) == before
    assert two_bundles.collect() == told


def test_collect_removes_damaged_and_interrupted(store: EngineStore, tmp_path: Path) -> None:
    store.fetch(KEY, tmp_path / "first", Maker())
    store.register(bundle_of(tmp_path / "canny", KEY))
    (store.root / "engines" / KEY / "more").touch()
    (store.root / "engines" / f".{OTHER}.x1").mkdir()
    assert {(row.key, row.reason) for row in store.collect()} == {
        (KEY, "damaged"),
        (OTHER, "an interrupted build left it"),
    }


def test_collect_removes_kernels_of_plans_that_are_gone(store: EngineStore, tmp_path: Path) -> None:
    (store.root / "kernels").mkdir(parents=True)
    for key in (KEY, OTHER):
        (store.root / "kernels" / f"{key}.cache").write_text("kernels")
    store.register(bundle_of(tmp_path / "canny", KEY))
    (found,) = store.collect()
    assert (found.key, found.bytes) == (OTHER, 7)
    assert [path.stem for path in (store.root / "kernels").iterdir()] == [KEY]


def test_collect_leaves_what_is_being_built(store: EngineStore, tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        assert store.collect() == []
        Maker()(folder)

    store.fetch(KEY, tmp_path / "bundle", make)
    assert (tmp_path / "bundle" / "engine.plan").is_file()


def test_collect_stops_at_a_manifest_that_it_cannot_read(store: EngineStore, tmp_path: Path) -> None:
    store.fetch(KEY, tmp_path / "first", Maker())
    bundle = bundle_of(tmp_path / "canny", KEY)
    store.register(bundle)
    (bundle / MANIFEST_NAME).write_text("{")
    with pytest.raises(DamagedBundleError, match="canny"):
        store.collect()
    assert (store.root / "engines" / KEY).is_dir()


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # works for root, too, whom a read-only folder does not stop
    with pytest.raises(BundleError, match=r"store .*file.* cannot be written.*--engine-store DIR.*ICEXPORT_CACHE"):
        EngineStore(tmp_path / "file" / "store").fetch(KEY, tmp_path / "bundle", Maker())


def test_a_read_only_store_serves_what_it_has(
    store: EngineStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.fetch(KEY, tmp_path / "first", Maker())

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    assert store.fetch(KEY, tmp_path / "second", Maker()) is True
    with pytest.raises(BundleError, match="cannot be written: Read-only file system"):
        store.fetch(OTHER, tmp_path / "third", Maker())


@pytest.mark.parametrize("shared", [0o2775, 0o755, 0o700])
def test_what_is_made_in_a_store_is_for_all_who_share_it(store: EngineStore, tmp_path: Path, shared: int) -> None:
    store.root.mkdir()
    store.root.chmod(shared)
    before = os.umask(0o077)
    try:
        store.fetch(KEY, tmp_path / "bundle", Maker())
        store.register(tmp_path / "bundle")
        folders = [store.kernels(KEY).parent, store.timing("10.16").parent]
    finally:
        os.umask(before)

    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    engines = store.root / "engines"
    assert {mode(p) for p in (engines, engines / KEY, store.root / "bundles", *folders)} == {shared}
    assert {mode(p) for p in (engines / KEY).iterdir()} == {shared & 0o666}
    assert mode(engines / f".{KEY}.lock") == 0o666


@pytest.mark.parametrize("full", ["make", "write_text", "rename"])
def test_a_store_on_a_full_disk(
    store: EngineStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if full != "make":
        monkeypatch.setattr(Path, full, refuse)
    # What the builder says of its own work is told by whoever holds the bundle's folder open: bundle.store.writing.
    with pytest.raises(OSError if full == "make" else BundleError, match="No space left on device"):
        store.fetch(KEY, tmp_path / "bundle", refuse if full == "make" else Maker())
    monkeypatch.undo()
    assert [p.name for p in (store.root / "engines").iterdir()] == [f".{KEY}.lock"]
    assert store.fetch(KEY, tmp_path / "bundle", Maker()) is False


def test_where_the_store_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("ICEXPORT_CACHE", raising=False)
    assert EngineStore().root == tmp_path / "xdg" / "icexport"
    monkeypatch.setenv("ICEXPORT_CACHE", str(tmp_path / "ours"))
    assert EngineStore().root == tmp_path / "ours"
    assert EngineStore(tmp_path / "said").root == tmp_path / "said"
