"""Rules about the repository that no linter knows."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("benchmarks", "engines", "icexport", "training")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
HEAVY = {"cv2", "diffusers", "onnx", "onnxruntime", "torch", "transformers"}
MAX_LINES = 400


def test_the_sources_are_found() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(PACKAGES)
    assert Path(__file__) in TESTS


@pytest.mark.parametrize("package", ["icexport", "engines"])
def test_import_is_lean(package: str) -> None:
    code = f"import sys, {package}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == ""


def test_files_are_short() -> None:
    files = [*SOURCES, *TESTS]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def unsafe_loads(source: str) -> list[int]:
    """Lines of calls of ``torch.load`` that may unpickle arbitrary objects."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "torch.load"
        and not any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
    ]


def test_unsafe_loads_are_recognised() -> None:
    source = "torch.load(a, weights_only=True)\ntorch.load(b)\ntorch.load(c,\n  weights_only=False)"
    assert unsafe_loads(source) == [2, 3]


def test_no_pickle_is_trusted() -> None:
    found = {str(path.relative_to(ROOT)): unsafe_loads(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_import_directions() -> None:
    lint_imports = shutil.which("lint-imports", path=str(Path(sys.executable).parent)) or shutil.which("lint-imports")
    assert lint_imports, "import-linter is not installed: pip install -e '.[dev]'"
    run = subprocess.run([lint_imports, "--no-cache"], capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
