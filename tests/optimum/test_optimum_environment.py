"""The optimum extra in an environment of its own: made here, with the heavy packages of the running interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


def run(*command: str | Path) -> str:
    """The command's output; a failing command fails the test with it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interpreter of an environment with exactly what the extra asks for, and everything else borrowed."""
    folder = tmp_path_factory.mktemp("optimum") / "venv"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # Its own packages come first; torch, onnx and onnxruntime are found here and not downloaded.
    (own / "borrowed.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    run(python, "-m", "pip", "install", "--quiet", *project["optional-dependencies"]["optimum"])
    return python


@pytest.mark.slow
@pytest.mark.network
def test_optimum_extra_in_its_own_environment(python: Path) -> None:
    checks = Path(__file__).parent / "inside" / "optimum_cli_checks.py"
    output = run(python, "-m", "pytest", "--quiet", "-p", "no:cacheprovider", checks)
    assert " passed" in output
    assert "skipped" not in output
    assert "deselected" not in output
