"""Plans that cannot be loaded, or are not those of the graph."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.base import TensorSpec
from engines.errors import EngineError
from tests.engines.tensorrt.plan_double import INPUTS, OUTPUTS, Bench

pytestmark = pytest.mark.tensorrt


def replaced(specs: tuple[TensorSpec, ...], index: int, spec: TensorSpec) -> tuple[TensorSpec, ...]:
    return (*specs[:index], spec, *specs[index + 1 :])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": INPUTS[:1]}, "the graph has no input step"),
        ({"inputs": (*INPUTS, TensorSpec("text", torch.float32, ()))}, "it has no input text"),
        ({"outputs": OUTPUTS[:1]}, "the graph has no output tap"),
        ({"inputs": replaced(INPUTS, 1, OUTPUTS[1]), "outputs": (OUTPUTS[0], INPUTS[1])}, "it has no input tap"),
        (
            {"inputs": replaced(INPUTS, 0, TensorSpec("x", torch.float16, ("batch", 2, 3)))},
            r"x: float16 \[batch, 2, 3\] is FLOAT \[-1, 2, 3\] in it",
        ),
        ({"inputs": replaced(INPUTS, 0, TensorSpec("x", torch.float32, ("batch", 2, 4)))}, "is FLOAT"),
        ({"inputs": replaced(INPUTS, 1, TensorSpec("step", torch.float32, ("batch",)))}, r"is FLOAT \[\]"),
    ],
)
def test_a_plan_of_another_graph_is_refused(bench: Bench, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        bench.engine(**arguments)
    assert "icexport build --force --backend tensorrt-rtx" in str(caught.value)


def test_a_tensor_in_host_memory_is_refused(bench: Bench) -> None:
    location = {"ICudaEngine.get_tensor_location": lambda engine, name: engine.library.real.TensorLocation.HOST}
    with pytest.raises(EngineError, match=r"step: float32 \[\] would have to lie in host memory"):
        bench.engine(other=location)


def test_a_missing_plan_is_named(bench: Bench) -> None:
    bench.plan.unlink()
    with pytest.raises(EngineError, match="No such file"):
        bench.engine()


# In a process of its own that ends without cleaning up: where there is no driver, TensorRT-RTX may wait for ever for a
# lock of its own when a runtime is destroyed.
LOAD = """
import os, sys
from pathlib import Path
import pytest
from engines.errors import EngineError
from engines.tensorrt.engine import TensorRtEngine
from tests.engines.tensorrt import plan_double
plan_double.use_cpu(pytest.MonkeyPatch())
try:
    TensorRtEngine("unet", Path(sys.argv[1]), (), (), flavour="tensorrt-rtx", device="cpu")
except EngineError as error:
    print(error, flush=True)
    os._exit(0)
os._exit(1)
"""


@pytest.mark.parametrize("content", [b"", b"short", b"abcd" * 1000], ids=["empty", "short", "foreign"])
def test_the_real_library_says_why_it_cannot_load_a_plan(real: Any, tmp_path: Path, content: bytes) -> None:
    plan = tmp_path / "unet.plan"
    plan.write_bytes(content)
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(plan)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    message = done.stdout
    for part in ("'unet'", str(plan), f"tensorrt_rtx {real.__version__} cannot load", "build the plan again"):
        assert part in message
    reason = {b"": "empty file", b"short": "fewer than the header"}.get(content, "INVALID MALFORMED_ENGINE")
    assert reason in message
    if len(content) > 64:
        assert "magicTag" in message
