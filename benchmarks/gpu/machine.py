"""Which machine and which sources a result is of; imports nothing heavy."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
_PACKAGES = ("benchmarks", "engines", "icexport")


def version_of(package: str) -> str:
    """Return the version of a package, or ``not installed``."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def driver_version() -> str:
    """Return the version of NVIDIA's driver, or ``none``."""
    program = shutil.which("nvidia-smi")
    return (_output(program, "--query-gpu=driver_version", "--format=csv,noheader") if program else "") or "none"


def checkout() -> tuple[str, bool | None]:
    """Return the commit of these sources and whether they differ from it; ("unknown", None) outside of a checkout."""
    git = shutil.which("git")
    commit = _output(git, "-C", str(ROOT), "rev-parse", "HEAD") if git and (ROOT / ".git").exists() else ""
    if not git or not commit:
        return "unknown", None
    return commit, bool(_output(git, "-C", str(ROOT), "status", "--porcelain"))


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  fixed arguments
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""


def sources_hash() -> str:
    """Hash all code and data that a result depends on; says what ``commit`` cannot if files were changed."""
    digest = hashlib.sha256()
    files = (path for package in _PACKAGES for path in (ROOT / package).rglob("*") if path.suffix in (".py", ".json"))
    for path in sorted(files):
        if "results" not in path.parts:
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]
