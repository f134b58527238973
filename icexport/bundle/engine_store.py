"""The engine store: built engines by their key, shared by all bundles of a user, so that none is built twice.

A plan of an unchanged UNet serves the canny and the depth bundle; only ControlNet and probe are built anew. Bundles do
not depend on the store: they hold hard links to its files, or copies on another disk. ``icexport gc`` removes what no
bundle refers to any more.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from icexport.bundle.manifest import engine_keys
from icexport.errors import BundleError
from icexport.host.files import Hashes, Stamp

logger = logging.getLogger(__name__)

VARIABLE = "ICEXPORT_CACHE"
"""Environment variable that names the folder of the store."""

_HASHES = "hashes.json"


@dataclass(frozen=True)
class Removed:
    """One engine that ``collect`` removed, or would remove.

    Attributes:
        key: key of the engine.
        bytes: size of its files. Bundles that hold hard links to them keep the space in use.
        reason: why nothing needs it.
    """

    key: str
    bytes: int
    reason: str


class EngineStore:
    """Engines by key in one folder.

    Several users may share one: what is made in it gets the permissions of the folder itself, so that one that is
    writable for a group (``chmod 2775``) stays so.

    Args:
        root: the folder; made when the first engine is stored. None: ``$ICEXPORT_CACHE``, else ``icexport`` in the
            user's cache folder.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.root = Path(root or os.environ.get(VARIABLE) or caches / "icexport").absolute()

    @property
    def _engines(self) -> Path:
        return self.root / "engines"

    @property
    def _bundles(self) -> Path:
        return self.root / "bundles"

    def timing(self, name: str) -> Path:
        """Timing cache of one builder: what was measured once need not be measured again.

        Args:
            name: of builder, version and device.

        Raises:
            BundleError: the store cannot be written.
        """
        with self._writable():
            return self._folder("timing") / f"{name.replace(' ', '_')}.cache"

    def kernels(self, key: str) -> Path:
        """File for the kernels that TensorRT-RTX compiles from a plan for the GPU of this machine.

        Raises:
            BundleError: the store cannot be written.
        """
        with self._writable():
            return self._folder("kernels") / f"{key}.cache"

    def fetch(self, key: str, target: Path, make: Callable[[Path], None], hashes: Hashes | None = None) -> bool:
        """Put the engine of ``key`` into the folder ``target``; build it with ``make(folder)`` if it is not stored.

        Two builds of one key wait for each other, and the second one takes what the first one made.

        Args:
            key: key of the engine.
            target: a folder that is not there yet.
            make: writes the engine's files into an empty folder.
            hashes: hashes of files that are known already; None: none are.

        Returns:
            Whether it was stored already.

        Raises:
            BundleError: the store cannot be written. Whatever ``make`` raises passes through and leaves no trace.
        """
        hashes = hashes or Hashes()
        if self._take(key, target, hashes):
            return True
        with self._locked(key):
            if self._take(key, target, hashes):
                return True
            with self._writing(key) as folder:
                make(folder)
                with self._writable():
                    digests = {p.name: hashes(p) for p in sorted(folder.iterdir())}
                    (folder / _HASHES).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
            for name, digest in digests.items():  # they were renamed, not changed
                path = self._engines / key / name
                hashes.know(path, Stamp.of(path), digest)
            self._take(key, target, hashes)
        return False

    def register(self, bundle: Path) -> None:
        """Remember where a bundle lies, so that ``collect`` keeps its engines."""
        path = str(bundle.resolve())
        with self._writable():
            notes = self._folder("bundles")
            (notes / f"{hashlib.sha256(path.encode()).hexdigest()[:16]}.txt").write_text(path, encoding="utf-8")

    def collect(self, dry_run: bool = False) -> list[Removed]:
        """Remove the engines to which no bundle refers, damaged ones, and the traces of bundles that are gone.

        Args:
            dry_run: whether only to tell.

        Raises:
            BundleError: the store cannot be written.
        """
        used = self._used(dry_run)
        removed = []
        for folder in sorted(p for p in self._engines.glob("*") if p.is_dir()):
            key = folder.name.lstrip(".").partition(".")[0]
            if folder.name != key:
                reason = "an interrupted build left it"
            elif key not in used:
                reason = "no bundle refers to it"
            elif not _intact(folder, Hashes()):
                reason = "damaged"
            else:
                continue
            size = sum(p.stat().st_size for p in folder.iterdir())
            if dry_run or self._remove(folder, key):
                removed.append(Removed(key, size, reason))
        for cache in sorted(self.root.glob("kernels/*.cache")):
            if cache.stem not in used:
                removed.append(Removed(cache.stem, cache.stat().st_size, "compiled kernels of a plan that is gone"))
                if not dry_run:
                    with self._writable():
                        cache.unlink()
        return removed

    def _used(self, dry_run: bool) -> set[str]:
        """Return the keys of all engines of all bundles that are still where they were built."""
        used: set[str] = set()
        for note in self._bundles.glob("*.txt"):
            bundle = Path(note.read_text(encoding="utf-8"))
            try:
                # A manifest that cannot be read is an error: its engines must not be taken for unused.
                used |= engine_keys(bundle)
            except FileNotFoundError:
                if not dry_run:
                    with self._writable():
                        note.unlink(missing_ok=True)
            except OSError as error:
                raise BundleError(
                    f"{bundle} uses engines of {self.root}, but cannot be read ({error.strerror or error}), so that "
                    f"nobody knows which. Ask whom it belongs to, or remove {note} if it is gone for good."
                ) from error
        return used

    def _remove(self, folder: Path, key: str) -> bool:
        """Remove the folder of one engine, unless a build holds it at this moment."""
        lock = self._lock(key)
        try:
            with self._writable(), FileLock(lock, timeout=0, mode=0o666):
                shutil.rmtree(folder)
        except Timeout:
            return False
        lock.unlink(missing_ok=True)
        return True

    def _take(self, key: str, target: Path, hashes: Hashes) -> bool:
        """Link or copy a stored engine to ``target``, if there is an intact one."""
        folder = self._engines / key
        if not folder.is_dir():
            return False
        if not _intact(folder, hashes):
            logger.warning("The stored engine %s is damaged; it is built again", folder)
            return False
        target.mkdir(parents=True)
        for file in folder.iterdir():
            if file.name != _HASHES:
                _link(file, target / file.name, hashes)
        return True

    def _folder(self, name: str) -> Path:
        """A folder of the store, for those who may write to the store."""
        self.root.mkdir(parents=True, exist_ok=True)
        folder = self.root / name
        try:
            folder.mkdir()
        except FileExistsError:
            return folder
        folder.chmod(_mode(self.root))
        return folder

    def _lock(self, key: str) -> Path:
        return self._engines / f".{key}.lock"

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        with self._writable():
            self._folder("engines")
            lock = FileLock(self._lock(key), mode=0o666)  # another user of the store may be next
            try:
                lock.acquire(timeout=0)
            except Timeout:
                logger.info("Another build is making the engine %s; waiting for it", key[:12])
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _writing(self, key: str) -> Iterator[Path]:
        """Make a temporary folder that becomes the entry of ``key``, in place of a damaged one; needs the lock."""
        with self._writable():
            folder = self._engines / key
            temporary = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=self._engines))
        try:
            yield temporary
            with self._writable():
                mode = _mode(self._engines)
                for file in temporary.iterdir():
                    file.chmod(mode & 0o666)
                temporary.chmod(mode)  # mkdtemp makes it private
                shutil.rmtree(folder, ignore_errors=True)
                temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except Timeout:
            raise  # an OSError, too, but another build's doing
        except OSError as error:
            raise BundleError(
                f"The engine store {self.root} cannot be written: {error.strerror or error}. Choose another folder "
                f"with --engine-store DIR or the environment variable {VARIABLE}."
            ) from error


def _mode(folder: Path) -> int:
    return stat.S_IMODE(folder.stat().st_mode)


def _intact(folder: Path, hashes: Hashes) -> bool:
    """Tell whether an entry has exactly the files that were stored, unchanged."""
    try:
        expected = json.loads((folder / _HASHES).read_text(encoding="utf-8"))
        found = {p.name: hashes(p) for p in folder.iterdir() if p.name != _HASHES}
    except (OSError, ValueError):
        return False
    return bool(found) and found == expected


def _link(source: Path, target: Path, hashes: Hashes) -> None:
    """Make a second name for the same bytes, or a copy where the disk does not allow that."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
    else:
        hashes.know(target, Stamp.of(source), hashes(source))
