"""Running plans, on a double of TensorRT-RTX made from its real bindings; the CPU's memory stands in for the GPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx.parser
import pytest
import torch

from engines.base import TensorSpec
from engines.capture import CapturedCall
from engines.errors import BackendUnavailableError, EngineError, ShapeError
from engines.tensorrt import api, build
from engines.tensorrt import scratch as scratch_module
from engines.tensorrt.engine import TensorRtEngine
from engines.tensorrt.scratch import Scratch
from tests.engines.tensorrt import flows
from tests.engines.tensorrt.plan_double import INPUTS, OUTPUTS, STREAM, Bench, inputs

pytestmark = pytest.mark.tensorrt


def test_outputs_are_computed_in_memory_that_the_caller_owns(bench: Bench) -> None:
    engine = bench.engine()
    given = inputs(2)
    first = engine(given)
    assert list(first) == ["y", "tap"]
    assert torch.equal(first["y"], given["x"] + 1)
    second = engine({"x": given["x"] * 2, "step": given["step"]})
    assert torch.equal(first["y"], given["x"] + 1)
    assert torch.equal(second["y"], given["x"] * 2 + 1)
    assert bench.library.called("IExecutionContext.execute_async_v3") == [(STREAM,), (STREAM,)]


def test_inputs_are_read_in_place_unless_strides_or_alignment_forbid_it(bench: Bench) -> None:
    memory = torch.zeros(2048)
    start = (-memory.data_ptr() % 256) // 4
    aligned, odd = memory[start : start + 12].reshape(2, 2, 3), memory[start + 13 : start + 25].reshape(2, 2, 3)
    strided = torch.arange(12.0).reshape(3, 2, 2).permute(2, 1, 0)
    engine = bench.engine()
    for x in (aligned, odd, strided):
        assert torch.equal(engine({"x": x, "step": torch.tensor(0.0)})["y"], x + 1)
    used = [address for name, address in bench.library.called("IExecutionContext.set_tensor_address") if name == "x"]
    assert used[0] == aligned.data_ptr()
    assert used[1] != odd.data_ptr()
    assert used[2] != strided.data_ptr()


def test_outputs_that_nobody_wants_have_an_address_of_their_own(bench: Bench) -> None:
    engine = bench.engine()
    assert list(engine(inputs(1), ["tap"])) == ["tap"]
    addresses = dict(bench.library.called("IExecutionContext.set_tensor_address"))
    assert set(addresses) == {"x", "step", "y", "tap"}
    assert len(set(addresses.values())) == 4


def test_shapes_are_set_once_for_all_calls_that_have_them(bench: Bench) -> None:
    engine = bench.engine()
    for batch in (1, 2, 1, 2, 2):
        engine(inputs(batch))
    assert len(bench.library.called("ICudaEngine.create_execution_context")) == 2
    assert bench.library.called("IExecutionContext.set_input_shape") == [
        ("x", (1, 2, 3)), ("step", ()), ("x", (2, 2, 3)), ("step", ())
    ]  # fmt: skip
    assert len(bench.library.called("IExecutionContext.execute_async_v3")) == 5


def test_engines_share_scratch_memory_that_grows_to_the_largest(bench: Bench) -> None:
    scratch = Scratch("cpu")
    first = bench.engine(scratch=scratch)
    first(inputs(2))
    first(inputs(4))
    first(inputs(2))
    first(inputs(2))
    given = bench.library.called("IExecutionContext.set_device_memory")
    assert [size for _, size in given] == [2048, 4096, 2048]
    assert given[0][0] != given[1][0]
    assert given[1][0] == given[2][0]
    assert scratch.nbytes == 4096
    assert bench.library.called("IRuntimeConfig.set_execution_context_allocation_strategy") == [
        (bench.library.real.ExecutionContextAllocationStrategy.USER_MANAGED,)
    ]


def test_scratch_memory_of_another_device_is_refused(bench: Bench) -> None:
    with pytest.raises(EngineError, match="scratch memory is on meta"):
        bench.engine(scratch=Scratch("meta"))


def test_rtx_compiles_at_once_and_leaves_cuda_graphs_to_the_caller(bench: Bench) -> None:
    bench.engine()(inputs(1))
    real = bench.library.real
    assert bench.library.called("IRuntimeConfig.cuda_graph_strategy") == [(real.CudaGraphStrategy.DISABLED,)]
    assert bench.library.called("IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy") == [
        (real.DynamicShapesKernelSpecializationStrategy.EAGER,)
    ]
    assert not bench.library.called("IRuntimeConfig.create_runtime_cache")


def test_a_plan_that_rtx_says_cannot_be_captured_is_not(bench: Bench) -> None:
    engine = bench.engine(other={"IExecutionContext.is_stream_capturable": False})
    engine(inputs(1))
    bench.capture()
    with pytest.raises(EngineError, match="cannot be captured in a CUDA graph"):
        engine(inputs(1))
    engine = bench.engine()
    bench.monkeypatch.setattr(scratch_module, "capturing", lambda: False)
    engine(inputs(1))
    bench.capture()
    engine(inputs(1))
    assert bench.library.called("IExecutionContext.is_stream_capturable") == [(STREAM,), (STREAM,)]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"ICudaEngine.create_execution_context": None}, "no execution context"),
        ({"IExecutionContext.set_optimization_profile_async": False}, "profile 0 was refused"),
        ({"IExecutionContext.set_input_shape": False}, r"shape \[1, 2, 3\] of x: float32"),
        ({"IExecutionContext.set_tensor_address": False}, "memory of x: float32"),
        ({"IExecutionContext.execute_async_v3": False}, "the run failed"),
    ],
)
def test_what_the_library_refuses_is_an_error(bench: Bench, answer: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        bench.engine(other=answer)(inputs(1))
    assert "'unet'" in str(caught.value)


def test_outputs_whose_shapes_depend_on_values_are_refused(bench: Bench) -> None:
    other = {"IExecutionContext.get_tensor_shape": lambda context, name: bench.library.real.Dims((-1, 5))}
    with pytest.raises(EngineError, match="do not follow"):
        bench.engine(other=other)(inputs(1))


def test_a_failed_run_says_what_the_library_logged(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    errors = iter(["Error Code 1", "Error Code 1", "Error Code 2", "Error Code 3"])

    def fail(context: Any, stream: int) -> bool:
        severity = bench.library.real.ILogger.Severity
        for _ in range(2):
            engine._logger.log(severity.ERROR, next(errors))
        engine._logger.log(severity.WARNING, "slow stream")
        return False

    engine = bench.engine(other={"IExecutionContext.execute_async_v3": fail})
    for said in ("failed: Error Code 1. ", "failed: Error Code 2; Error Code 3. "):
        with caplog.at_level("WARNING"), pytest.raises(EngineError) as caught:
            engine(inputs(1))
        assert said in str(caught.value)
    assert "slow stream" in caplog.text
    assert "Error Code" not in caplog.text


def test_a_closed_engine_frees_contexts_first_and_refuses_calls(bench: Bench) -> None:
    engine = bench.engine()
    engine(inputs(1))
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="was closed"):
        engine(inputs(1))


def test_a_device_that_the_library_cannot_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailableError, match="cannot use device 'cpu'"):
        TensorRtEngine("unet", tmp_path / "p", INPUTS, OUTPUTS, flavour="tensorrt-rtx", device="cpu")
    assert "cpu" not in api.check("tensorrt-rtx").devices


@pytest.mark.gpu
def test_a_real_plan_runs_on_a_gpu_alone_and_captured(tmp_path: Path) -> None:
    flavour = next((name for name in api.FLAVOURS if api.check(name).usable), None)
    if flavour is None:
        pytest.skip(" and ".join(api.check(name).reason for name in api.FLAVOURS))
    onnx.save(onnx.parser.parse_model(flows.MODEL), tmp_path / "model.onnx")
    profiles = ({"x": ((1, 2), (2, 2), (8, 2))}, {"x": ((4, 2),) * 3})
    build.build_plan(
        build.PlanRequest(flavour, tmp_path / "model.onnx", tmp_path / "model.plan", "fp16", profiles),
        lambda phase, fraction: None,
    )
    half = torch.float16
    specs = [TensorSpec("x", half, ("batch", 2))], [TensorSpec("y", half, ("batch", 2))]
    engine = TensorRtEngine(
        "identity", tmp_path / "model.plan", *specs, flavour=flavour, runtime_cache=tmp_path / "kernels"
    )
    captured = CapturedCall(engine)
    for batch in (1, 4, 8, 4, 1):
        x = torch.randn(batch, 2, device="cuda", dtype=half)
        assert torch.equal(engine({"x": x})["y"], x)
        for _ in range(3):
            assert torch.equal(captured({"x": x})["y"], x)
    with pytest.raises(ShapeError, match="not built for x"):
        engine({"x": torch.zeros(9, 2, device="cuda", dtype=half)})
    captured.close()
    engine.close()
