"""The file of kernels that TensorRT-RTX has compiled: kept, replaced, and refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.errors import EngineError
from tests.engines.tensorrt.plan_double import Bench, inputs

pytestmark = pytest.mark.tensorrt


def test_rtx_keeps_compiled_kernels_in_a_file(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "kernels.bin"
    contents = [b"one", b"two"]
    other = {"IRuntimeCache.serialize": lambda cache: bench.library.make("IHostMemory", contents.pop(0))}
    engine = bench.engine(other=other, runtime_cache=path)
    engine(inputs(1))
    engine(inputs(1))
    assert path.read_bytes() == b"one"
    engine(inputs(2))
    assert path.read_bytes() == b"two"
    assert [file.name for file in tmp_path.iterdir() if "kernels" in file.name] == ["kernels.bin"]
    bench.engine(runtime_cache=path)
    assert bench.library.called("IRuntimeCache.deserialize") == [(b"two",)]


def test_rtx_replaces_a_cache_of_another_gpu(bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "kernels.bin"
    path.write_bytes(b"foreign")
    other = {
        "IRuntimeCache.deserialize": False,
        "IRuntimeCache.serialize": lambda cache: bench.library.make("IHostMemory", b"mine"),
    }
    with caplog.at_level("INFO"):
        bench.engine(other=other, runtime_cache=path)(inputs(1))
    assert "another GPU, driver or version" in caplog.text
    assert path.read_bytes() == b"mine"


def test_a_cache_that_cannot_be_written_is_an_error(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    other = {"IRuntimeCache.serialize": lambda cache: bench.library.make("IHostMemory", b"")}
    engine = bench.engine(other=other, runtime_cache=tmp_path / "file" / "kernels.bin")
    with pytest.raises(EngineError, match="cannot be written"):
        engine(inputs(1))
    with pytest.raises(EngineError, match="runtime cache was refused"):
        bench.engine(other={"IRuntimeConfig.set_runtime_cache": False}, runtime_cache=tmp_path / "kernels.bin")
