"""Models by name: files and folders of this disk, caches of the Hugging Face Hub, and the Hub itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from icexport.errors import CheckpointError, UsageError
from icexport.models.weights import SUFFIXES, choose_weights, library_of

_TEXTS = (".json", ".txt", ".model")


def locate(name: str, parts: Sequence[str] = (), variant: str | None = None) -> Path:
    """Return a file or folder as it is, or the snapshot of a Hub repository, of which no more than needed is fetched.

    Args:
        name: path of a file or folder, path of a repository's folder in a Hub cache, or a Hub id (``owner/name``).
        parts: folders of the repository that are needed; (): the files at its root.
        variant: variant of the weights; None: those without one, or the only one that there is.

    Raises:
        CheckpointError: there is no such thing, or it cannot be fetched.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _snapshot(path)
    if path.is_file():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{name} is neither a file, nor a folder, nor a Hub id (owner/name).")
    return _fetch(name, parts, variant)


def _snapshot(folder: Path) -> Path:
    """Return the snapshot that is meant by a repository's folder in a Hub cache; any other folder as it is."""
    if not (folder / "snapshots").is_dir():
        return folder
    main = folder / "refs" / "main"
    if main.is_file():
        named = folder / "snapshots" / main.read_text(encoding="utf-8").strip()
        if named.is_dir():
            return named
    snapshots = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    if len(snapshots) != 1:
        listed = ", ".join(path.name for path in snapshots) or "none"
        raise CheckpointError(f"{folder} is a Hub cache without a main revision. Name one of its snapshots: {listed}.")
    return snapshots[0]


def _fetch(name: str, parts: Sequence[str], variant: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    unreachable = (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError)
    try:
        try:
            files = HfApi().list_repo_files(name)
        except RepositoryNotFoundError:
            raise
        except unreachable:
            return Path(snapshot_download(name, local_files_only=True))
        return Path(snapshot_download(name, allow_patterns=wanted_files(files, parts, variant)))
    except unreachable as error:
        raise CheckpointError(
            f"{name} is not a folder here and could not be fetched from the Hub: {str(error).splitlines()[0]} Check "
            "the name and the connection, or give the path of a local folder."
        ) from error


def wanted_files(files: Sequence[str], parts: Sequence[str], variant: str | None = None) -> list[str]:
    """Return which files of a repository are needed.

    Args:
        files: POSIX paths of all of its files.
        parts: folders that are needed; (): the root.
        variant: variant of the weights, where a folder has it.
    """
    wanted = [file for file in files if "/" not in file and file.endswith(_TEXTS)]
    for part in parts or ("",):
        inside = {PurePosixPath(file).name: file for file in files if str(PurePosixPath(file).parent) == (part or ".")}
        wanted += [file for name, file in inside.items() if name.endswith(_TEXTS) and ".index." not in name]
        wanted += [inside[name] for name in _weight_names(list(inside), library_of(part), variant)]
    return list(dict.fromkeys(wanted))


def _weight_names(names: list[str], library: str, variant: str | None) -> list[str]:
    """Return the weights that are meant, and all that could be where that cannot be told."""
    every = [name for name in names if name.endswith(SUFFIXES)]
    try:
        found = choose_weights(names, library, variant)
    except UsageError:
        return every
    if found is None:
        return every
    if found.index is None:
        return list(found.files)
    stem = found.index.partition(".")[0] + (f".{found.variant}" if found.variant else "")
    return [found.index, *(name for name in every if name.startswith(f"{stem}-") and "-of-" in name)]
