"""Captured calls: buffers and errors on the CPU, with a recorder that replays operators; real CUDA graphs on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engines.capture import CapturedCall, CudaRecorder, Function, Recording
from engines.errors import EngineError
from tests.recorder import TapeRecorder


def step(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"sum": inputs["a"] + inputs["b"], "double": inputs["a"] * 2}


@pytest.fixture
def recorder() -> TapeRecorder:
    return TapeRecorder()


def test_every_call_gives_the_outputs_of_its_own_inputs(recorder: TapeRecorder) -> None:
    call = CapturedCall(step, recorder)
    for seed in range(3):
        a, b = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(seed))
        results = call({"a": a, "b": b})
        assert list(results) == ["sum", "double"]
        assert torch.equal(results["sum"], a + b)
        assert torch.equal(results["double"], a * 2)
    assert len(recorder.recorded) == 1


def test_the_graph_reads_copies_and_leaves_the_inputs_alone(recorder: TapeRecorder) -> None:
    def in_place(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": inputs["x"].add_(1)}

    x = torch.zeros(3)
    call = CapturedCall(in_place, recorder)
    for _ in range(2):
        call({"x": x})
        assert torch.equal(x, torch.zeros(3))
    assert recorder.recorded[0]["x"].data_ptr() != x.data_ptr()


def test_inputs_may_have_any_strides(recorder: TapeRecorder) -> None:
    call = CapturedCall(step, recorder)
    for _ in range(2):
        a = torch.randn(3, 4).T
        assert torch.equal(call({"b": torch.ones(4, 3), "a": a})["sum"], a + 1)
    assert recorder.recorded[0]["a"].is_contiguous()


def test_outputs_are_valid_until_the_next_call(recorder: TapeRecorder) -> None:
    call = CapturedCall(step, recorder)
    first = call({"a": torch.zeros(2), "b": torch.zeros(2)})
    second = call({"a": torch.ones(2), "b": torch.ones(2)})
    assert first["sum"].data_ptr() == second["sum"].data_ptr()
    first.clear()
    assert set(call({"a": torch.zeros(2), "b": torch.zeros(2)})) == {"sum", "double"}


def test_every_combination_of_shapes_dtypes_and_names_is_recorded_once(recorder: TapeRecorder) -> None:
    call = CapturedCall(lambda inputs: {"y": sum(inputs.values(), torch.tensor(0))}, recorder)
    small, large, half = torch.ones(2), torch.ones(3), torch.ones(2, dtype=torch.float16)
    combinations: list[dict[str, Tensor]] = [
        {"a": small}, {"a": large}, {"a": half}, {"b": small}, {"a": small, "b": small}, {"a": torch.ones(2, 1)}
    ]  # fmt: skip
    results = [call(inputs)["y"] for inputs in combinations]
    for inputs, result in zip(combinations, results, strict=True):
        assert torch.equal(call(inputs)["y"], result)
    assert len(recorder.recorded) == len(combinations)
    assert torch.equal(call({"b": small * 5, "a": small})["y"], small * 6)
    assert len(recorder.recorded) == len(combinations)


def test_inference_mode_and_gradients_do_not_reach_the_buffers(recorder: TapeRecorder) -> None:
    call = CapturedCall(step, recorder)
    with torch.inference_mode():
        call({"a": torch.zeros(2), "b": torch.zeros(2)})
    a = torch.ones(2, requires_grad=True)
    result = call({"a": a, "b": torch.ones(2)})["sum"]
    assert torch.equal(result, torch.full((2,), 2.0))
    assert not result.requires_grad


def test_what_python_decides_is_decided_once(recorder: TapeRecorder) -> None:
    factor, calls = 2.0, 0

    def scaled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        return {"y": inputs["x"] * factor if factor < 4 else inputs["x"] - 1}

    call = CapturedCall(scaled, recorder)
    for factor in (2.0, 3.0, 4.0):  # noqa: B007  the function reads it
        for x in (torch.tensor([1.0]), torch.tensor([5.0])):
            assert torch.equal(call({"x": x})["y"], 2 * x)
    assert (calls, recorder.replays) == (1, 6)
    assert torch.equal(call({"x": torch.ones(2)})["y"], torch.zeros(2)), "another shape is another recording"


def test_other_memory_that_the_function_reads_may_change(recorder: TapeRecorder) -> None:
    weight = torch.ones(3)
    call = CapturedCall(lambda inputs: {"y": (inputs["x"] * weight).sum(-1), "w": weight[1:]}, recorder)
    for value in (1.0, 2.0, 3.0):
        weight.fill_(value)
        results = call({"x": torch.arange(3.0)})
        assert results["y"].item() == 3 * value
        assert results["w"].tolist() == [value] * 2


def test_a_function_that_reads_results_back_cannot_be_recorded(recorder: TapeRecorder) -> None:
    for back in (lambda x: x * float(x.sum()), lambda x: x.nonzero(), lambda x: x if x.any() else -x):
        with pytest.raises(EngineError, match="waits for the GPU"):
            CapturedCall(lambda inputs, back=back: {"y": back(inputs["x"])}, recorder)({"x": torch.ones(2)})


def test_a_failed_recording_is_an_error_every_time_and_never_an_eager_run() -> None:
    calls: list[dict[str, Tensor]] = []

    def fail(function: Function, inputs: dict[str, Tensor]) -> Recording:
        raise EngineError("cannot be captured")

    call = CapturedCall(lambda inputs: calls.append(inputs) or {}, fail)
    for _ in range(2):
        with pytest.raises(EngineError, match="cannot be captured"):
            call({"a": torch.zeros(1)})
    assert not calls


def test_closing_lets_go_of_the_buffers(recorder: TapeRecorder) -> None:
    call = CapturedCall(step, recorder)
    inputs = {"a": torch.zeros(2), "b": torch.zeros(2)}
    call(inputs)
    call.close()
    call(inputs)
    assert len(recorder.recorded) == 2


@pytest.mark.parametrize("inputs", [{}, {"a": torch.zeros(1), "b": torch.zeros(1)}], ids=["none", "cpu"])
def test_a_cuda_graph_needs_tensors_on_a_gpu(inputs: dict[str, Tensor]) -> None:
    with pytest.raises(EngineError, match="needs all inputs on one CUDA device, got (no inputs|a on cpu, b on cpu)"):
        CapturedCall(step)(inputs)


@pytest.mark.gpu
def test_replays_are_bit_equal_and_follow_the_inputs() -> None:
    weight = torch.randn(256, 256, device="cuda")
    call = CapturedCall(lambda inputs: {"y": torch.softmax(inputs["x"] @ weight, -1)})
    x = torch.randn(64, 256, device="cuda")
    first = call({"x": x})["y"].clone()
    for _ in range(10):
        assert torch.equal(call({"x": x})["y"], first)
    assert torch.equal(call({"x": x * 2})["y"], torch.softmax((x * 2) @ weight, -1))
    assert torch.equal(call({"x": x})["y"], first)


@pytest.mark.gpu
def test_graphs_of_one_recorder_can_be_replayed_in_turn() -> None:
    recorder = CudaRecorder()
    calls: list[Callable[[dict[str, Tensor]], dict[str, Tensor]]] = [
        CapturedCall(lambda inputs: {"y": (inputs["x"] * 3).cumsum(-1)}, recorder),
        CapturedCall(lambda inputs: {"y": (inputs["x"] + 1).sort(-1).values}, recorder),
    ]
    for size in (1000, 3000, 1000):
        x = torch.randn(4, size, device="cuda")
        assert torch.equal(calls[0]({"x": x})["y"], (x * 3).cumsum(-1))
        assert torch.equal(calls[1]({"x": x})["y"], (x + 1).sort(-1).values)


@pytest.mark.gpu
def test_a_function_that_waits_for_the_gpu_is_an_error_and_harms_nothing() -> None:
    x = torch.ones(8, device="cuda")
    call = CapturedCall(lambda inputs: {"y": inputs["x"] * float(inputs["x"].sum())})
    for _ in range(2):
        with pytest.raises(EngineError, match="cannot be captured in a CUDA graph"):
            call({"x": x})
    assert torch.equal(CapturedCall(lambda inputs: {"y": inputs["x"] * 8})({"x": x})["y"], x * 8)
