"""What the tests of the kernels share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import once

ROOT = Path(__file__).parents[3]
Results = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="session")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Results]:
    """Results of an operator's small cases in Triton's interpreter, by the name of the case."""

    def run(operator: str) -> Results:
        def make(folder: Path) -> None:
            folder.mkdir()
            script = Path(__file__).with_name("interpreted.py")
            done = subprocess.run(
                [sys.executable, str(script), operator],
                env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            (folder / "results.json").write_text(done.stdout, encoding="utf-8")

        folder = once(tmp_path_factory, f"interpreted-{operator}", make)
        results: Results = defaultdict(list)
        for result in json.loads((folder / "results.json").read_text(encoding="utf-8")):
            results[result["case"]].append(result)
        return results

    return run
