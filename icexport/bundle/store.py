"""Bundles on disk: opened with checked hashes, written beside their place and moved there in one go."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from icexport.bundle.manifest import MANIFEST_NAME, Manifest
from icexport.bundle.records import GraphEntry
from icexport.errors import BundleError, DamagedBundleError
from icexport.host.files import Hashes

if TYPE_CHECKING:
    from icexport.conditions import Condition

logger = logging.getLogger(__name__)


class Bundle:
    """A bundle folder and its manifest.

    Args:
        path: the bundle's folder.
        hashes: hashes of files that are known already.

    Raises:
        BundleError: the bundle cannot be read, see ``Manifest.read``. Files are hashed when they are used, not here.
    """

    def __init__(self, path: str | Path, hashes: Hashes | None = None) -> None:
        self.path = Path(path)
        self.hashes = hashes or Hashes()
        _recover(self.path.resolve())
        self.manifest = Manifest.read(self.path)

    def __repr__(self) -> str:
        condition, key = self.manifest.condition.name, self.manifest.key[:12]
        return f"Bundle({str(self.path)!r}, condition={condition!r}, key={key!r})"

    def graph(self, name: str) -> GraphEntry:
        """Return the entry of one graph.

        Raises:
            BundleError: the bundle has no such graph; those that it has are listed.
        """
        try:
            return self.manifest.graphs[name]
        except KeyError as error:
            raise BundleError(
                f"{self.path} has no graph {name!r}; it has {', '.join(self.manifest.graphs)}."
            ) from error

    def condition(self, **options: object) -> Condition:
        """Return what the bundle's control maps show: extracts them, and scores pictures.

        Args:
            **options: options of the condition.

        Raises:
            ConditionError: an option is unknown or out of range.
        """
        from icexport import conditions  # imports torch, which reading a manifest does without

        manifest = self.manifest
        return conditions.of_model(manifest.condition.name, manifest.source.model, **options)

    def file(self, name: str) -> Path:
        """Return the path of one file, after checking its hash.

        Raises:
            DamagedBundleError: the file is missing or was changed.
        """
        self.verify([name])
        return self.path / name

    def onnx(self, graph: str, *, plugins: bool = False) -> Path:
        """Return the path of a graph's ONNX file, after checking its hash and that of its weights.

        Args:
            graph: name of the graph.
            plugins: whether to take the file with plugins as nodes; only for a graph that has one.
        """
        entry = self.graph(graph)
        file = (entry.plugin_file if plugins else None) or entry.file
        self.verify(f for f in self.manifest.files if f == file or f == f"{file}.data")
        return self.path / file

    def folder(self, name: str) -> Path:
        """Return the path of a folder (``tokenizer``, ``scheduler``), after checking every file in it.

        Raises:
            DamagedBundleError: a file is missing, was changed, or was added: libraries read all that they find.
        """
        folder = self.path / name
        found = {
            p.relative_to(self.path).as_posix()
            for p in folder.rglob("*")
            if p.is_file() and not p.name.startswith(".")
        }
        self.verify(found | {f for f in self.manifest.files if f.startswith(f"{name}/")})
        return folder

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Hash files and compare with the manifest; all of them if no names are given.

        Raises:
            DamagedBundleError: a file is missing, was changed, or has no hash; all such files are listed.
        """
        problems = []
        for name in sorted(self.manifest.files if names is None else names):
            if name not in self.manifest.files:
                problems.append(f"{name} was added")
                continue
            try:
                if self.hashes(self.path / name) != self.manifest.files[name]:
                    problems.append(f"{name} was changed")
            except OSError as error:
                problems.append(f"{name} cannot be read ({error.strerror or error})")
        if problems:
            raise DamagedBundleError(f"The bundle {self.path} is damaged: {'; '.join(problems)}. Build it again.")


def files_of(folder: Path) -> dict[str, Path]:
    """Return every file below ``folder`` but the manifest, by POSIX path."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST_NAME)
    return {path.relative_to(folder).as_posix(): path for path in paths}


@contextmanager
def writing(output: Path) -> Iterator[Path]:
    """Make a temporary folder beside ``output`` that becomes ``output`` if the block ends well.

    Whatever goes wrong in the block, Ctrl-C and a full disk included, an existing bundle stays as it was.

    Raises:
        BundleError: another build is writing there, the folder holds something that is no bundle, or the disk refuses.
    """
    output = output.resolve()  # a link stays a link: what it points to is replaced
    if output.exists() and not (output / MANIFEST_NAME).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise BundleError(f"{output} exists and is not a bundle: choose another --output, or remove it yourself.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(_lock(output), timeout=0):
            _restore(output)
            _sweep(output)
            temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".tmp", dir=output.parent))
            try:
                yield temporary
                _swap(temporary, output)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except Timeout as error:
        raise BundleError(
            f"Another build is writing {output} at this moment. Wait for it, or choose another --output."
        ) from error
    except OSError as error:
        raise BundleError(
            f"Could not build {output}: {error}. Nothing was changed; an earlier bundle is untouched."
        ) from error


def _lock(output: Path) -> Path:
    return output.parent / f".{output.name}.lock"


def _backup(output: Path) -> Path:
    return output.parent / f".{output.name}.old"


def _swap(temporary: Path, output: Path) -> None:
    temporary.chmod(0o755)  # mkdtemp makes it private
    try:
        if output.exists():
            output.rename(_backup(output))
        temporary.rename(output)
    except BaseException:
        _restore(output)
        raise
    shutil.rmtree(_backup(output), ignore_errors=True)


def _recover(output: Path) -> None:
    """Call `_restore` unless a build is alive: then the bundle is only missing between the two renames of its swap."""
    if not output.exists() and _backup(output).is_dir():
        try:
            with FileLock(_lock(output), timeout=1):
                _restore(output)
        except OSError:  # the lock is held, or the disk is read-only: reading the manifest says what is missing
            logger.debug("Could not restore %s", output, exc_info=True)


def _restore(output: Path) -> None:
    """Bring an earlier bundle back if a build was killed between the two renames of its swap; needs the lock."""
    if not output.exists() and _backup(output).is_dir():
        logger.warning("%s: an earlier build was killed at its last step; its bundle is restored", output)
        _backup(output).rename(output)


def _sweep(output: Path) -> None:
    """Remove what killed builds left behind; whoever holds the lock is the only build alive."""
    name = re.compile(rf"\.{re.escape(output.name)}\.(old|[a-z0-9_]{{8}}\.tmp)")
    for path in output.parent.iterdir():
        if name.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
