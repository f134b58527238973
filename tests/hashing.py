"""Hashes of whole folders, as tests compare them."""

from __future__ import annotations

from pathlib import Path

from icexport.bundle.store import files_of
from icexport.host.files import sha256


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below ``folder`` but the manifest, by POSIX path."""
    return {name: sha256(path) for name, path in files_of(folder).items()}
