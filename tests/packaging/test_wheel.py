"""The wheel: what is in it, and what it does in an empty environment, which is made here, away from the sources."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.network]

ROOT = Path(__file__).parents[2]
PACKAGES = ("engines", "icexport", "training")
SAMPLES = {  # one of each kind of data
    "engines/kernels/tuning/residual_mix.json",
    "engines/py.typed",
    "icexport/py.typed",
    "icexport/reference/model/tokenizer/vocab.json",
    "icexport/reference/model/unet/diffusion_pytorch_model.safetensors",
    "training/recipes/reference.toml",
    "training/reference/card.md",
}

Run = Callable[..., subprocess.CompletedProcess[str]]


def checked(*command: str | Path, cwd: Path = ROOT) -> str:
    """The command's output; a failing command fails the test with it."""
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    """Files that git knows; others are not to get into the wheel."""
    return set(checked("git", "ls-files", "-z").strip("\0").split("\0"))


@pytest.fixture(scope="module")
def wheel(tracked: set[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources, wheels = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheels")
    for name in tracked:
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, sources / name)
    checked(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", wheels, sources)
    (wheel,) = wheels.iterdir()
    return wheel


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Commands of an environment that has the wheel and what it needs, no extra."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=True)
    constraints = ROOT / "constraints.txt"
    checked(folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--constraint", constraints, wheel)
    return folder / "bin"


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the commands run in: a picture with its caption, and what they write."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "data").mkdir()
    shutil.copy(ROOT / "docs/images/apple.png", folder / "data")
    (folder / "data/metadata.jsonl").write_text('{"file_name": "apple.png", "text": "a red apple"}\n')
    return folder


@pytest.fixture(scope="module")
def icexport(bin_folder: Path, elsewhere: Path) -> Run:
    """``icexport("inspect", bundle)`` -> result with returncode, stdout, stderr."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return lambda *args: subprocess.run(
        [bin_folder / "icexport", *args], capture_output=True, text=True, check=False, cwd=elsewhere, env=environment
    )


def test_contents(wheel: Path, tracked: set[str]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.partition("/")[0].endswith(".dist-info")}
    assert names == {name for name in tracked if name.partition("/")[0] in PACKAGES}
    assert names >= SAMPLES
    assert not any("tests" in Path(name).parts for name in names)


def test_the_main_job(icexport: Run, bin_folder: Path, elsewhere: Path) -> None:
    def output(*args: str) -> str:
        found = icexport(*args)
        assert found.returncode == 0, found.stdout + found.stderr
        return found.stdout

    assert output("--version").startswith("icexport ")
    found = json.loads(output("doctor", "--json"))
    assert found["reference_model"]
    assert found["problems"] == []
    output("build", "--cond", "canny", "--output", "canny")
    output("generate", "canny", "--prompt", "a red apple", "--image", "data/apple.png", "--output", "apple.png")
    assert (elsewhere / "apple.png").stat().st_size > 0
    assert "onnxruntime" in output("inspect", "canny")
    where = "import icexport, engines, training; print(icexport.__file__, engines.__file__, training.__file__)"
    files = checked(bin_folder / "python", "-c", where, cwd=elsewhere).split()
    assert all(Path(file).is_relative_to(bin_folder.parent) for file in files)


@pytest.mark.parametrize(
    "command",
    [
        "train base --work work",
        "train probe --cond canny --data data",
        "train controlnet --cond canny --data data",
        "evaluate --cond canny --model reference --data data --output judged",
    ],
)
def test_what_needs_the_extra_says_so_in_one_line(icexport: Run, command: str) -> None:
    found = icexport(*command.split())
    assert found.returncode == 1
    assert found.stdout == ""
    (line,) = found.stderr.splitlines()
    assert line.startswith("Error: ")
    assert "pip install 'icexport[train]'" in line
