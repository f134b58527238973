"""What only classic TensorRT does in a build, and what needs a GPU, on a double made from real bindings.

The bindings are TensorRT-RTX's, which has the interface of TensorRT 11;
the other versions are in ``test_trt_bindings.py``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from onnx import helper

from engines.errors import BackendUnavailableError, EngineError
from engines.kernels import plugins
from engines.tensorrt import build
from engines.tensorrt.build import PlanReport, PlanRequest, build_plan
from tests.engines.tensorrt.bindings import Library
from tests.engines.tensorrt.onnx_models import HALF, conv, save

pytestmark = pytest.mark.tensorrt
PLUGIN = "icexport::dual_projection"


class Double:
    """A library that has parsed y = conv(x), fp16, and builds ``b"the plan"`` from it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        try:
            import tensorrt_rtx
        except ImportError as error:
            pytest.skip(f"tensorrt_rtx cannot be imported: {error}; run: pip install tensorrt-rtx-cu13")
        self.library = library = Library(tensorrt_rtx)
        library.module.__version__ = "11.4.0"  # type: ignore[attr-defined]
        for module in ("tensorrt", "tensorrt_rtx"):
            monkeypatch.setitem(sys.modules, module, library.module)
        monkeypatch.setattr(build, "driver_problem", lambda: None)
        node, weight = conv("only", "x", "y", HALF)
        self.onnx = save(folder / "conv.onnx", [node], dict.fromkeys("xy", HALF), [weight])
        self.plan = folder / "conv.plan"
        self.loggers: list[Any] = []
        half, shape = tensorrt_rtx.DataType.HALF, tensorrt_rtx.Dims((1, 4, 8, 8))
        library.answers = {
            "Builder.__init__": lambda builder, logger: self.loggers.append(logger),
            "Builder.build_serialized_network": lambda *_: library.make("IHostMemory", b"the plan", nbytes=8),
            "INetworkDefinition.num_inputs": 1,
            "INetworkDefinition.get_input": library.make("ITensor", name="x", dtype=half, shape=shape),
            "INetworkDefinition.num_layers": 1,
            "INetworkDefinition.get_layer": library.make("ILayer", name="node_only", metadata="", num_outputs=1),
            "ILayer.get_output": library.make("ITensor", name="y", dtype=half, shape=shape),
            "ICudaEngine.num_io_tensors": 1,
            "ICudaEngine.get_tensor_name": "x",
            "ICudaEngine.get_tensor_dtype": half,
            "ICudaEngine.num_layers": 3,
            "Runtime.get_engine_validity": (tensorrt_rtx.EngineValidity.VALID, 0),
            "EngineInspector.get_engine_information": inspected("Half"),
            "ITimingCache.serialize": lambda cache: library.make("IHostMemory", b"timings"),
        }

    def says(self, text: str, result: Any) -> Callable[..., Any]:
        """An answer that also logs an error."""

        def answer(*_: Any) -> Any:
            self.loggers[0].log(self.library.real.ILogger.ERROR, text)
            return result

        return answer

    def build(self, flavour: str = "tensorrt", **fields: Any) -> PlanReport:
        return build_plan(PlanRequest(flavour, self.onnx, self.plan, "fp16", **fields), lambda what, fraction: None)


def inspected(kind: str) -> str:
    layer = {"LayerType": "CaskConvolution", "Outputs": [{"Name": "y", "Format/Datatype": kind}]}
    return json.dumps({"Layers": [layer]})


@pytest.fixture
def double(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Double:
    return Double(tmp_path, monkeypatch)


def test_the_plan_is_loaded_again_and_its_precision_read_from_the_engine(double: Double) -> None:
    report = double.build(workspace_bytes=1 << 20, optimization_level=5)

    assert (report.read_from, report.layers, report.precision) == ("engine", 3, {"fp16": 1})
    assert double.plan.read_bytes() == b"the plan"
    called = double.library.called
    assert called("Runtime.deserialize_cuda_engine") == [(b"the plan",)]
    assert called("IBuilderConfig.profiling_verbosity") == [(double.library.real.ProfilingVerbosity.DETAILED,)]
    assert called("IBuilderConfig.builder_optimization_level") == [(5,)]
    assert called("IBuilderConfig.set_memory_pool_limit") == [(double.library.real.MemoryPoolType.WORKSPACE, 1 << 20)]


def test_precision_is_left_to_the_strongly_typed_network(double: Double) -> None:
    double.build()
    strongly_typed = double.library.real.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert double.library.called("Builder.create_network") == [(1 << int(strongly_typed),)]
    for setter in ("set_flag", "flags", "set_compute_capability", "num_compute_capabilities", "set_timing_cache"):
        assert double.library.called(f"IBuilderConfig.{setter}") == []


def test_every_profile_gets_its_own_shapes(double: Double) -> None:
    real = double.library.real
    tensor = double.library.make("ITensor", name="x", dtype=real.DataType.HALF, shape=real.Dims((-1, 4, 8, -1)))
    double.library.answers["INetworkDefinition.get_input"] = tensor
    shapes = [tuple((batch, 4, 8, 8) for batch in batches) for batches in ((1, 2, 4), (8, 8, 8))]

    double.build(profiles=tuple({"x": three} for three in shapes))

    assert double.library.called("IOptimizationProfile.set_shape") == [("x", *three) for three in shapes]
    assert len(double.library.called("IBuilderConfig.add_optimization_profile")) == 2

    double.library.answers["IBuilderConfig.add_optimization_profile"] = -1
    with pytest.raises(EngineError, match="TensorRT refuses optimisation profile 0"):
        double.build(profiles=({"x": shapes[0]},))


def test_an_engine_in_another_precision_is_no_plan(double: Double) -> None:
    double.library.answers["EngineInspector.get_engine_information"] = inspected("Float")
    with pytest.raises(EngineError, match="no layer of the engine has it: 1 fp32"):
        double.build()
    assert not double.plan.exists()


def test_a_plan_that_cannot_be_loaded_is_no_plan(double: Double) -> None:
    double.library.answers["Runtime.deserialize_cuda_engine"] = double.says("magic tag does not match", None)
    with pytest.raises(EngineError, match="the plan that was just built cannot be loaded: magic tag does not match"):
        double.build()
    assert not double.plan.exists()


def test_an_rtx_plan_for_another_gpu_is_read_from_the_network(double: Double) -> None:
    double.library.answers["Runtime.get_engine_validity"] = (double.library.real.EngineValidity.INVALID, 1)
    report = double.build("tensorrt-rtx", targets=(120,))
    assert (report.read_from, report.layers) == ("network", 1)
    assert double.library.called("Runtime.deserialize_cuda_engine") == []


def test_timings_are_kept_from_build_to_build(double: Double, tmp_path: Path) -> None:
    cache = tmp_path / "timings"
    for content in (b"", b"timings"):
        report = double.build(timing_cache=cache)
        assert double.library.called("IBuilderConfig.create_timing_cache")[-1] == (content,)
        assert double.library.called("IBuilderConfig.set_timing_cache")[-1][1] is False, "no foreign timings"
        assert cache.read_bytes() == b"timings"
        assert report.warnings == ()
    assert {path.name for path in tmp_path.iterdir()} == {"conv.onnx", "conv.plan", "timings"}


@pytest.mark.parametrize("damage", ["create_timing_cache", "set_timing_cache"])
def test_timings_that_do_not_fit_are_written_anew(double: Double, tmp_path: Path, damage: str) -> None:
    cache = tmp_path / "timings"
    cache.write_bytes(b"of another GPU")
    if damage == "create_timing_cache":
        double.library.answers["IBuilderConfig.create_timing_cache"] = lambda config, content: (
            None if content else double.library.make("ITimingCache")
        )
    else:
        fits = iter([False, True])
        double.library.answers["IBuilderConfig.set_timing_cache"] = lambda config, cache, ignore: next(fits)

    report = double.build(timing_cache=cache)

    assert len(report.warnings) == 1
    assert "timings is damaged or of another GPU or version" in report.warnings[0]
    assert [content for (content,) in double.library.called("IBuilderConfig.create_timing_cache")] == [
        b"of another GPU",
        b"",
    ]
    assert cache.read_bytes() == b"timings"


def test_a_timing_cache_that_is_no_file(double: Double, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot read the timing cache"):
        double.build(timing_cache=tmp_path)


def test_a_builder_that_does_not_start(double: Double) -> None:
    def refuse(builder: Any, logger: Any) -> None:
        logger.log(double.library.real.ILogger.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    double.library.answers["Builder.__init__"] = refuse
    with pytest.raises(
        BackendUnavailableError, match="cannot start a builder: CUDA initialization failure.*nvidia-smi"
    ):
        double.build()


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("Error Code 2: OutOfMemory (Requested size was 8589934592 bytes.)", "ran out of memory"),
        ("Unexpected exception std::bad_alloc", "ran out of memory"),
        ("Could not find any implementation for node node_only.", "raise the workspace limit"),
        ("Something else", "another opset"),
    ],
)
def test_a_builder_that_fails_is_quoted_with_a_way_out(double: Double, said: str, advice: str) -> None:
    double.library.answers["Builder.build_serialized_network"] = double.says(said, None)
    with pytest.raises(EngineError, match="could not build the engine") as error:
        double.build()
    assert said in str(error.value)
    assert advice in str(error.value)
    assert not double.plan.exists()


def test_a_level_that_the_library_clamps_is_refused(double: Double) -> None:
    config = double.library.make("IBuilderConfig")
    double.library.answers["Builder.create_builder_config"] = config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(config), "builder_optimization_level", property(lambda _: 3), raising=False)
        with pytest.raises(EngineError, match="refuses optimisation level 5"):
            double.build(optimization_level=5)


def test_plugins_are_registered_before_parsing_and_found_again(
    double: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[Any] = []
    monkeypatch.setattr(plugins, "register", lambda module, names: order.append(names))
    double.library.answers["OnnxParser.parse_from_file"] = lambda parser, path: order.append("parsed") or True
    node = helper.make_node("dual_projection", ["x"], ["y"], name="node_only", domain="icexport")
    double.onnx = save(tmp_path / "plugin.onnx", [node], dict.fromkeys("xy", HALF))
    with pytest.raises(EngineError, match=f"{PLUGIN} was asked for, but nodes node_only became no plugin"):
        double.build(plugins=(PLUGIN,))

    plugin_layer = double.library.real.LayerType.PLUGIN_V3
    double.library.answers["INetworkDefinition.get_layer"] = double.library.make(
        "ILayer", name="node_only", metadata="[ONNX Layer: node_only]", num_outputs=1, type=plugin_layer
    )
    with pytest.raises(EngineError, match="1 plugin layers were asked for, the engine holds 0"):
        double.build(plugins=(PLUGIN,))

    layer = {"LayerType": "PluginV3", "Outputs": [{"Name": "y", "Format/Datatype": "Half"}]}
    double.library.answers["EngineInspector.get_engine_information"] = json.dumps({"Layers": [layer]})
    assert double.build(plugins=(PLUGIN,)).plugins == (PLUGIN,)
    assert order == [(PLUGIN,), "parsed"] * 3
