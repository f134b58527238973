"""Every combination of torch and torchvision wheels that was met, as the metadata that their wheels carry."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from icexport.errors import IcexportError
from icexport.host.preflight import check_torchvision

CUDA_RUNTIME = "torchvision.libs/libcudart.faf08d9a.so.13"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty site-packages folder, the only one that can be seen."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def install(site: Path, name: str, version: str, files: tuple[str, ...] = (), requires: str = "") -> None:
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    requirement = f"Requires-Dist: {requires}\n" if requires else ""
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requirement}")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def install_torch(site: Path, version: str, cuda: str | None) -> None:
    install(site, "torch", version)
    (site / "torch").mkdir()
    (site / "torch" / "version.py").write_text(
        f"from typing import Optional\n\n__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\n"
    )


@pytest.mark.parametrize(
    ("torch", "cuda", "torchvision", "files", "requires"),
    [
        pytest.param("2.13.0", "13.0", "0.28.0", (CUDA_RUNTIME,), "torch (==2.13.0)", id="index-cuda"),
        pytest.param("2.13.0+cu130", "13.0", "0.28.0+cu130", (CUDA_RUNTIME,), "torch==2.13.0", id="cuda"),
        pytest.param("2.13.0+cpu", None, "0.28.0+cpu", (), "torch==2.13.0", id="cpu"),
        pytest.param("2.13.0", None, "0.28.0", (), "torch==2.13.0", id="without-local-version-on-cpu"),
    ],
)
def test_wheels_that_fit(
    site: Path, torch: str, cuda: str | None, torchvision: str, files: tuple[str, ...], requires: str
) -> None:
    install_torch(site, torch, cuda)
    install(site, "torchvision", torchvision, files, requires)
    check_torchvision()


@pytest.mark.parametrize(
    ("torch", "torchvision", "files"),
    [
        pytest.param("2.13.0+cpu", "0.28.0", (CUDA_RUNTIME,), id="cpu-torch-index-torchvision"),
        pytest.param("2.13.0", "0.28.0", (CUDA_RUNTIME,), id="cpu-torch-without-local-version"),
        pytest.param("2.13.0+cpu", "0.28.0+cu130", (), id="local-versions"),
    ],
)
def test_a_cuda_torchvision_beside_a_cpu_torch(
    site: Path, torch: str, torchvision: str, files: tuple[str, ...]
) -> None:
    install_torch(site, torch, None)
    install(site, "torchvision", torchvision, files, "torch==2.13.0")
    with pytest.raises(IcexportError, match=r"built for CUDA.*pip uninstall torchvision"):
        check_torchvision()


def test_a_torchvision_for_another_torch(site: Path) -> None:
    install_torch(site, "2.13.0+cpu", None)
    install(site, "torchvision", "0.27.0+cpu", requires="torch==2.12.0")
    with pytest.raises(IcexportError, match=r"requires torch==2\.12\.0.*pip uninstall torchvision"):
        check_torchvision()


def test_without_torchvision_or_torch(site: Path) -> None:
    check_torchvision()
    install(site, "torchvision", "0.28.0", (CUDA_RUNTIME,), "torch==2.13.0")
    check_torchvision()


def test_as_a_program_it_prints_only_the_message(site: Path) -> None:
    install_torch(site, "2.13.0+cpu", None)
    install(site, "torchvision", "0.28.0", (CUDA_RUNTIME,), "torch==2.13.0")
    code = f"import sys; sys.path.insert(0, {str(site)!r}); import runpy; " + (
        "runpy.run_module('icexport.host.preflight', run_name='__main__')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3]
    )
    assert run.returncode == 1
    assert run.stderr.startswith("torchvision 0.28.0 does not fit torch 2.13.0+cpu")
    assert "Traceback" not in run.stderr
