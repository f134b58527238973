"""The adapter's real code, run on a double of one version's bindings, in a process of its own.

Usage: python -m tests.engines.tensorrt.flows FLAVOUR FOLDER. Prints JSON: flow -> null, or the error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import pytest
import torch

from engines.errors import EngineError
from engines.tensorrt import build
from engines.tensorrt.engine import TensorRtEngine
from tests.engines.tensorrt import plan_double
from tests.engines.tensorrt.bindings import Library, install

MODEL = """
<ir_version: 10, opset_import: ["" : 21]>
graph (float16[batch, 2] x) => (float16[batch, 2] y) <float16[2, 2] w = {1, 0, 0, 1}> { y = MatMul (x, w) }
"""


def build_plan(flavour: str, folder: Path) -> None:
    """Parser, configuration, profiles, timing cache, targets, progress, plan, reading back."""
    rtx = flavour == "tensorrt-rtx"
    onnx.save(onnx.parser.parse_model(MODEL), folder / "model.onnx")
    library = install(flavour, {})
    half = library.real.DataType.HALF
    x = library.make("ITensor", name="x", dtype=half, shape=library.real.Dims((-1, 2)))
    y = library.make("ITensor", name="y", dtype=half, shape=library.real.Dims((-1, 2)))
    names = ["x", "y"]

    def serialise(builder: Any, network: Any, config: Any) -> Any:
        monitor = config.progress_monitor
        monitor.phase_start("build", None, 1)
        monitor.step_complete("build", 0)
        monitor.phase_finish("build")
        return library.make("IHostMemory", b"the plan", nbytes=8)

    library.answers = {
        "INetworkDefinition.num_inputs": 1,
        "INetworkDefinition.get_input": x,
        "INetworkDefinition.num_layers": 1,
        "ILayer.num_outputs": 1,
        "ILayer.get_output": y,
        "Builder.build_serialized_network": serialise,
        "Runtime.get_engine_validity": (library.real.EngineValidity.VALID, 0) if rtx else None,
        "ICudaEngine.num_layers": 1,
        "ICudaEngine.num_io_tensors": 2,
        "ICudaEngine.get_tensor_name": lambda engine, index: names[index],
        "ICudaEngine.get_tensor_dtype": half,
        "EngineInspector.get_engine_information": json.dumps({"Layers": [{"Outputs": [{"Format/Datatype": "Half"}]}]}),
        "ITimingCache.serialize": lambda cache: library.make("IHostMemory", b"timings"),
    }
    progress: list[str] = []
    request = build.PlanRequest(
        flavour,
        folder / "model.onnx",
        folder / "model.plan",
        "fp16",
        ({"x": ((1, 2), (2, 2), (4, 2))}, {"x": ((2, 2),) * 3}),
        targets=(86, 120) if rtx else (),
        workspace_bytes=1 << 30,
        timing_cache=None if rtx else folder / "timings",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "driver_problem", lambda: None)
        report = build.build_plan(request, lambda phase, fraction: progress.append(phase))
    assert (folder / "model.plan").read_bytes() == b"the plan"
    assert report.read_from == "engine"
    assert report.precision == {"fp16": 1}
    assert "build" in progress
    assert len(library.called("IOptimizationProfile.set_shape")) == 2
    if rtx:
        targets = [int(target) for target, _ in library.called("IBuilderConfig.set_compute_capability")]
        assert targets == [86, 120]
    else:
        assert (folder / "timings").read_bytes() == b"timings"


def refused_model(flavour: str, folder: Path) -> None:
    """A parser that takes nothing, and what it says of the reason."""
    onnx.save(onnx.parser.parse_model(MODEL), folder / "refused.onnx")
    answers = {"OnnxParser.parse_from_file": False, "OnnxParser.num_errors": 1, "ParserError.desc": "no such op"}
    library = install(flavour, answers)
    error_codes = library.real.ErrorCode
    library.answers["ParserError.code"] = error_codes.UNSUPPORTED_NODE
    request = build.PlanRequest(flavour, folder / "refused.onnx", folder / "refused.plan", "fp16")
    with pytest.raises(EngineError, match="UNSUPPORTED_NODE: no such op"):
        build.build_plan(request, lambda phase, fraction: None)


def run_plan(flavour: str, folder: Path) -> None:
    """Loading, profiles, contexts, scratch memory, addresses, execution, runtime cache, closing."""
    (folder / "run.plan").write_bytes(b"plan")
    cache = folder / "kernels" if flavour == "tensorrt-rtx" else None
    profiles = [((1, 2, 3), (2, 2, 3), (4, 2, 3)), plan_double.static(2)]
    library = install(flavour, plan_double.answers(profiles))
    if cache is not None:
        library.answers["IRuntimeCache.serialize"] = lambda _: library.make("IHostMemory", b"kernels")
    with pytest.MonkeyPatch.context() as patch:
        plan_double.use_cpu(patch)
        for _ in range(2):
            engine = _engine(flavour, folder, cache)
            for batch in (2, 3, 2):
                x = torch.rand(batch, 2, 3)
                y = engine({"x": x, "step": torch.tensor(1.0)}, ["y"])["y"]
                assert torch.equal(y, x + 1)
            engine.close()
    assert len(library.called("IExecutionContext.execute_async_v3")) == 6
    assert len(library.called("IExecutionContext.set_tensor_address")) == 24
    profiles_used = [index for index, _ in library.called("IExecutionContext.set_optimization_profile_async")]
    assert profiles_used == [1, 0, 1, 0]
    if cache is not None:
        assert cache.read_bytes() == b"kernels"
        assert library.called("IRuntimeCache.deserialize") == [(b"kernels",)]


def captured_run(flavour: str, folder: Path) -> None:
    """A call while a CUDA graph is being captured."""
    (folder / "run.plan").write_bytes(b"plan")
    library = install(flavour, plan_double.answers([plan_double.static(2)]))
    with pytest.MonkeyPatch.context() as patch:
        plan_double.use_cpu(patch)
        engine = _engine(flavour, folder, None)
        engine({"x": torch.rand(2, 2, 3), "step": torch.tensor(1.0)})
        patch.setattr("engines.tensorrt.engine.capturing", lambda: True)
        engine({"x": torch.rand(2, 2, 3), "step": torch.tensor(1.0)})
    asked = library.called("IExecutionContext.is_stream_capturable")
    assert asked == ([(plan_double.STREAM,)] if flavour == "tensorrt-rtx" else [])


def damaged_plan(flavour: str, folder: Path) -> None:
    """A plan that the library does not load."""
    (folder / "run.plan").write_bytes(b"junk" * 100)
    answers = plan_double.answers([], **{"Runtime.deserialize_cuda_engine": None})
    library = install(flavour, answers)
    if flavour == "tensorrt-rtx":
        diagnostics = library.real.EngineInvalidityDiagnostics
        bits = int(diagnostics.VERSION_MISMATCH) | int(diagnostics.UNSUPPORTED_CC)
        library.answers["Runtime.get_engine_validity"] = (library.real.EngineValidity.INVALID, bits)
    with pytest.MonkeyPatch.context() as patch:
        plan_double.use_cpu(patch)
        with pytest.raises(EngineError, match="cannot load the plan") as caught:
            _engine(flavour, folder, None)
    if flavour == "tensorrt-rtx":
        assert "INVALID VERSION_MISMATCH UNSUPPORTED_CC" in str(caught.value)


def fp16_flag(flavour: str, folder: Path) -> None:
    """What the adapter must never do: ask the builder for a precision."""
    module = _library(flavour).module
    builder = module.Builder(module.Logger(module.Logger.ERROR))
    builder.create_builder_config().set_flag(module.BuilderFlag.FP16)


def old_context(flavour: str, folder: Path) -> None:
    """A method that went away."""
    _library(flavour).make("ICudaEngine").create_execution_context_without_device_memory()


def plugin_layer(flavour: str, folder: Path) -> None:
    """A method that TensorRT-RTX does not have."""
    library = _library(flavour)
    assert library.make("INetworkDefinition").add_plugin_v3


def wrong_name(flavour: str, folder: Path) -> None:
    """An argument called by a name that it does not have."""
    _library(flavour).make("IExecutionContext").set_tensor_address(name="x", address=1)


def wrong_type(flavour: str, folder: Path) -> None:
    """An argument of a type that the method does not take."""
    _library(flavour).make("IExecutionContext").set_input_shape("x", "2x3")


def too_many(flavour: str, folder: Path) -> None:
    """An argument too many."""
    _library(flavour).make("IExecutionContext").execute_async_v3(1, 2)


def read_only(flavour: str, folder: Path) -> None:
    """A property that cannot be set."""
    _library(flavour).make("ICudaEngine").num_io_tensors = 3


FLOWS: tuple[Callable[[str, Path], None], ...] = (
    build_plan,
    refused_model,
    run_plan,
    captured_run,
    damaged_plan,
    fp16_flag,
    old_context,
    plugin_layer,
    wrong_name,
    wrong_type,
    too_many,
    read_only,
)


def _library(flavour: str) -> Library:
    return install(flavour, {})


def _engine(flavour: str, folder: Path, cache: Path | None) -> TensorRtEngine:
    specs = plan_double.INPUTS, plan_double.OUTPUTS
    return TensorRtEngine("unet", folder / "run.plan", *specs, flavour=flavour, device="cpu", runtime_cache=cache)


def _error(flow: Callable[[str, Path], None], flavour: str, folder: Path) -> str | None:
    try:
        flow(flavour, folder)
    except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001  whatever it is, the test reports it
        return f"{type(error).__name__}: {error}"
    return None


def main() -> None:
    """Run every flow."""
    flavour, folder = sys.argv[1], Path(sys.argv[2])
    results = {flow.__name__: _error(flow, flavour, folder) for flow in FLOWS}
    module = sys.modules[flavour.replace("-", "_")]
    print(json.dumps({"version": module.__version__, "flows": results}))  # noqa: T201


if __name__ == "__main__":
    main()
