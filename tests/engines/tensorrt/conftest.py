"""What the tests of running plans share: a double of TensorRT-RTX made from its real bindings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engines.tensorrt.plan_double import Bench


@pytest.fixture(scope="session")
def real() -> Any:
    try:
        import tensorrt_rtx
    except ImportError as error:
        pytest.skip(f"tensorrt_rtx cannot be imported: {error}; run: pip install tensorrt-rtx-cu13")
    return tensorrt_rtx


@pytest.fixture
def bench(real: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(real, tmp_path, monkeypatch)
