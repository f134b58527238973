"""Finds, before anything heavy is imported, an installation that is known to break with errors that mislead."""

from __future__ import annotations

import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from icexport.errors import IcexportError


def check_torchvision() -> None:
    """Refuse a torchvision that does not fit the installed torch.

    transformers and diffusers import torchvision whenever it is installed, and a wheel built for another torch breaks
    all of their models with "operator torchvision::nms does not exist". icexport needs no torchvision, but ``pip
    install torchvision`` beside a CPU build of torch fetches one built for CUDA. Call this before importing diffusers
    or transformers. Reads the metadata of the two packages, and imports neither.

    Raises:
        IcexportError: if torchvision requires another version of torch, or needs the CUDA that torch lacks.
    """
    try:
        torch, torchvision = distribution("torch"), distribution("torchvision")
    except PackageNotFoundError:
        return
    problems = [
        f"requires {requirement}"
        for requirement in map(Requirement, torchvision.requires or [])
        if requirement.name == "torch" and not requirement.specifier.contains(torch.version, prereleases=True)
    ]
    if _built_for_cuda(torchvision) and _built_without_cuda(torch):
        problems.append("is built for CUDA, which this torch is built without")
    if problems:
        raise IcexportError(
            f"torchvision {torchvision.version} does not fit torch {torch.version}: it {' and '.join(problems)}. "
            "With it, every import of diffusers or transformers fails. icexport does not use torchvision. "
            "Run: pip uninstall torchvision"
        )


def _built_for_cuda(torchvision: Distribution) -> bool:
    """Tell by the wheel's local version or, where it has none (the package index), by the CUDA runtime in it."""
    local = Version(torchvision.version).local or ""
    return local.startswith("cu") or any(file.name.startswith("libcudart") for file in torchvision.files or [])


def _built_without_cuda(torch: Distribution) -> bool:
    """Tell by the wheel's local version, or by ``cuda`` in the generated torch/version.py."""
    local = Version(torch.version).local
    if local is not None:
        return not local.startswith("cu")
    generated = Path(str(torch.locate_file("torch/version.py")))
    return generated.is_file() and bool(re.search(r"^cuda\b.*= None$", generated.read_text(), re.MULTILINE))


if __name__ == "__main__":
    try:
        check_torchvision()
    except IcexportError as error:
        sys.exit(str(error))
