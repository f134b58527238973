"""A skip is a failure where all tests have to run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.skips import ALL_TESTS, ALLOWED_REASONS

ROOT = Path(__file__).parents[1]
CASES = f"""
import pytest

def test_skip():
    pytest.skip("a part is missing")

@pytest.mark.skipif(True, reason="another part is missing")
def test_mark(): ...

@pytest.fixture
def missing():
    pytest.skip("a third part is missing")

def test_fixture(missing): ...

@pytest.mark.skipif(True, reason={next(iter(ALLOWED_REASONS))!r})
def test_allowed(): ...

@pytest.mark.gpu
def test_gpu():
    pytest.skip("whatever")

@pytest.mark.xfail
def test_expected_failure():
    assert False

def test_passes(): ...
"""


@pytest.mark.parametrize(
    ("setting", "counts"),
    [
        ("1", {"failed": 1, "errors": 3, "passed": 1, "skipped": 2, "xfailed": 1}),
        ("", {"passed": 1, "skipped": 6, "xfailed": 1}),
    ],
)
def test_what_a_skip_becomes(setting: str, counts: dict[str, int], tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a CUDA GPU\n")
    (tmp_path / "test_cases.py").write_text(CASES)
    (tmp_path / "test_module.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")
    options = ["-p", "tests.skips", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=tmp_path,
        env=os.environ | {ALL_TESTS: setting, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    last = run.stdout.splitlines()[-1]
    assert {word: int(count) for count, word in re.findall(r"(\d+) ([a-z]+)", last)} == counts, run.stdout
    if setting:
        for part in ("a part", "another part", "a third part", "could not import 'no_such_module'"):
            assert f"but this one was: {part}" in run.stdout
