"""ONNX Runtime against torch: the same numbers, no hidden conversion, clear errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import torch

from engines import availability
from engines import onnxruntime as backend
from engines.base import TensorSpec
from engines.errors import BackendUnavailableError, EngineError, OutOfMemoryError, ShapeError
from engines.onnxruntime import OnnxRuntimeEngine

ROOT = Path(__file__).parents[2]
SCALER = """
<ir_version: 8, opset_import: ["" : 18]>
graph (float[batch, 2, width] x, float[batch] scale) => (float[batch, 2, width] y, float[2] total, int64[3] size)
<int64[2] inner = {1, 2}, int64[2] outer = {0, 2}> {
    column = Unsqueeze (scale, inner)
    y = Mul (x, column)
    total = ReduceSum <keepdims = 0> (y, outer)
    size = Shape (y)
}
"""
TYPES = """
<ir_version: 8, opset_import: ["" : 18]>
graph (float16[n, m] half, int64[] step, bool[n] flag) => (float16[n, m] double, int64[] next, bool[n] inverse) {
    double = Add (half, half)
    next = Add (step, step)
    inverse = Not (flag)
}
"""
NONZERO = """
<ir_version: 8, opset_import: ["" : 18]>
graph (float[n] x) => (int64[1, found] where) {
    where = NonZero (x)
}
"""
TWICE = """
<ir_version: 8, opset_import: ["" : 18]>
graph (float[n] x) => (float[twice] y) {
    y = Concat <axis = 0> (x, x)
}
"""
LARGE = """
<ir_version: 8, opset_import: ["" : 18]>
graph (int64[1] size) => (float[n] zeros) {
    zeros = ConstantOfShape (size)
}
"""
STRINGS = """
<ir_version: 8, opset_import: ["" : 18]>
graph (string[n] x) => (string[n] y) {
    y = Identity (x)
}
"""


def save(text: str, path: Path) -> Path:
    model = onnx.parser.parse_model(text)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.SetInParent()  # the text form reads ``int64[]`` as unknown rank, not as a scalar
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def expected(x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    y = x * scale[:, None, None]
    return {"y": y, "total": y.sum((0, 2)), "size": torch.tensor(y.shape)}


def sample(batch: int, width: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(batch, 2, width, generator=generator),
        "scale": torch.randn(batch, generator=generator),
    }


@pytest.fixture
def engine(tmp_path: Path) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine("scaler", save(SCALER, tmp_path / "scaler.onnx"), threads=1)


def test_specs_come_from_the_graph(engine: OnnxRuntimeEngine) -> None:
    assert engine.inputs == (
        TensorSpec("x", torch.float32, ("batch", 2, "width")),
        TensorSpec("scale", torch.float32, ("batch",)),
    )
    assert engine.outputs[1:] == (
        TensorSpec("total", torch.float32, (2,)),
        TensorSpec("size", torch.int64, (3,)),
    )


def test_same_numbers_as_torch_at_changing_shapes_and_repeated_calls(engine: OnnxRuntimeEngine) -> None:
    for seed, (batch, width) in enumerate([(1, 3), (4, 5), (1, 3), (4, 5)]):
        inputs = sample(batch, width, seed)
        torch.testing.assert_close(engine(inputs), expected(**inputs))


def test_strided_inputs_are_read_in_their_logical_order(engine: OnnxRuntimeEngine) -> None:
    inputs = {"x": sample(3, 5)["x"].transpose(0, 2)[:, :, :2], "scale": torch.arange(10.0)[::2]}
    assert not any(tensor.is_contiguous() for tensor in inputs.values())
    for _ in range(2):
        torch.testing.assert_close(engine(inputs), expected(**inputs))


def test_outputs_belong_to_the_caller(engine: OnnxRuntimeEngine) -> None:
    kept = []
    for seed in range(3):
        inputs = sample(2, 4, seed)
        kept.append((engine(inputs), expected(**inputs)))
    engine.close()
    for got, want in kept:
        torch.testing.assert_close(got, want)


def test_wanted_outputs_in_the_wanted_order(engine: OnnxRuntimeEngine) -> None:
    inputs = sample(2, 4)
    want = expected(**inputs)
    assert list(engine(inputs, ["total"])) == ["total"]
    for _ in range(2):  # "total" is bound to torch memory, the others to ONNX Runtime's and then to torch's
        got = engine(inputs, ["size", "total", "y", "size"])
        assert list(got) == ["size", "total", "y"]
        torch.testing.assert_close(got, {name: want[name] for name in got})


def test_torch_memory_is_written_directly(engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = sample(2, 4)
    monkeypatch.setattr(torch, "tensor", lambda *_args, **_kwargs: pytest.fail("the output was copied"))
    got = engine(inputs)
    monkeypatch.undo()
    torch.testing.assert_close(got, expected(**inputs))


def test_sizes_that_no_input_has_are_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = OnnxRuntimeEngine("twice", save(TWICE, tmp_path / "twice.onnx"), threads=1)
    copied = []
    tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *args, **options: copied.append(1) or tensor(*args, **options))
    for size in (2, 2, 3, 2):
        x = torch.arange(float(size))
        torch.testing.assert_close(engine({"x": x}), {"y": torch.cat([x, x])})
    assert len(copied) == 2, "once for each size"


def test_every_problem_of_the_inputs_is_in_one_error(engine: OnnxRuntimeEngine) -> None:
    with pytest.raises(ShapeError) as caught:
        engine({"x": torch.zeros(1, 3, 4, dtype=torch.float64), "zoom": torch.zeros(1)})
    for part in ("missing: scale: float32 [batch]", "unexpected: zoom", "dtype float64", "[1, 3, 4]", "'scaler'"):
        assert part in str(caught.value)


def test_other_dtypes(tmp_path: Path) -> None:
    engine = OnnxRuntimeEngine("types", save(TYPES, tmp_path / "types.onnx"))
    half, flag = torch.randn(2, 3).half(), torch.tensor([True, False])
    for _ in range(2):
        got = engine({"half": half, "step": torch.tensor(21), "flag": flag})
        torch.testing.assert_close(got, {"double": half + half, "next": torch.tensor(42), "inverse": ~flag})


def test_output_shape_that_depends_on_values_is_refused_not_wrong(tmp_path: Path) -> None:
    engine = OnnxRuntimeEngine("nonzero", save(NONZERO, tmp_path / "nonzero.onnx"))
    assert engine({"x": torch.tensor([0.0, 1.0, 1.0])})["where"].tolist() == [[1, 2]]
    with pytest.raises(EngineError, match=r"nonzero\.onnx"):
        engine({"x": torch.tensor([1.0, 0.0, 0.0])})


def test_weights_beside_the_file(tmp_path: Path) -> None:
    weight = np.arange(2048, dtype=np.float32)
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> graph (float[2048] x) => (float[2048] y) { y = Add (x, w) }'
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    path = tmp_path / "external.onnx"
    onnx.save(model, path, save_as_external_data=True, location="external.onnx.data", size_threshold=0)
    got = OnnxRuntimeEngine("external", path)({"x": torch.ones(2048)})
    torch.testing.assert_close(got["y"], torch.arange(2048.0) + 1)
    (tmp_path / "external.onnx.data").unlink()
    with pytest.raises(EngineError, match=r"external\.onnx"):
        OnnxRuntimeEngine("external", path)


def test_missing_damaged_and_unsupported_files(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no ONNX file at .*absent\.onnx"):
        OnnxRuntimeEngine("absent", tmp_path / "absent.onnx")
    damaged = save(SCALER, tmp_path / "damaged.onnx")
    damaged.write_bytes(damaged.read_bytes()[:-40])
    with pytest.raises(EngineError, match=r"damaged\.onnx"):
        OnnxRuntimeEngine("damaged", damaged)
    with pytest.raises(EngineError, match=r"tensor\(string\)"):
        OnnxRuntimeEngine("strings", save(STRINGS, tmp_path / "strings.onnx"))


def test_a_failing_run_names_the_file(engine: OnnxRuntimeEngine) -> None:
    engine.inputs = engine.inputs[:1]  # leaves an input of the session unbound
    with pytest.raises(EngineError, match=r"scaler\.onnx.*scale"):
        engine({"x": torch.zeros(1, 2, 3)})


def test_a_lack_of_memory_is_told_from_other_failures(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = OnnxRuntimeEngine("large", save(LARGE, tmp_path / "large.onnx"))
    with pytest.raises(OutOfMemoryError, match="not enough memory"):
        engine({"size": torch.tensor([1 << 50])})

    import onnxruntime

    def starved(*_args: object, **_options: object) -> None:
        raise RuntimeError("[ONNXRuntimeError] : 6 : Exception during initialization: std::bad_alloc")

    monkeypatch.setattr(onnxruntime, "InferenceSession", starved)
    with pytest.raises(OutOfMemoryError, match="bad_alloc"):
        OnnxRuntimeEngine("large", tmp_path / "large.onnx")
    assert capfd.readouterr().err == "", "ONNX Runtime says nothing of its own"


def test_closed(engine: OnnxRuntimeEngine) -> None:
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine(sample(1, 1))


def test_no_fallback_from_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendUnavailableError, match="onnxruntime-gpu"):
        OnnxRuntimeEngine("scaler", save(SCALER, tmp_path / "scaler.onnx"), device="cuda")


def test_no_fallback_when_the_cuda_provider_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    class CpuOnlySession(onnxruntime.InferenceSession):  # what a wheel without its CUDA libraries does
        def __init__(self, model: str, options: object, **_: object) -> None:
            super().__init__(model, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", CpuOnlySession)
    with pytest.raises(BackendUnavailableError, match="could not be started"):
        backend._open_session(save(SCALER, tmp_path / "scaler.onnx"), tmp_path, torch.device("cuda:0"), None, False)


@pytest.mark.parametrize(("torch_cuda", "devices"), [(True, ("cpu", "cuda")), (False, ("cpu",))])
def test_check_offers_cuda_only_if_torch_has_it_too(
    torch_cuda: bool, devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_cuda)
    found = availability.onnxruntime()
    assert found.devices == devices
    assert found.version == onnxruntime.__version__
    assert bool(found.reason) is not torch_cuda


def test_check_of_a_missing_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = availability.onnxruntime()
    assert not found.usable
    assert "pip install" in found.fix


@pytest.mark.gpu
def test_cuda_gives_the_same_numbers(tmp_path: Path) -> None:
    if "cuda" not in (found := availability.onnxruntime()).devices:
        pytest.skip(found.reason)
    engine = OnnxRuntimeEngine("scaler", save(SCALER, tmp_path / "scaler.onnx"), device="cuda")
    for seed in range(3):
        inputs = {name: tensor.cuda() for name, tensor in sample(4, 5, seed).items()}
        got = engine(inputs)
        assert {tensor.device.type for tensor in got.values()} == {"cuda"}
        want = expected(**{name: tensor.cpu() for name, tensor in inputs.items()})
        torch.testing.assert_close({name: tensor.cpu() for name, tensor in got.items()}, want)
    with pytest.raises(ShapeError, match="on cpu, expected cuda:0"):
        engine(sample(4, 5))


def test_a_dead_tensor_is_not_kept_for_a_later_one(tmp_path: Path) -> None:
    """One tensor of 64 MB at each end, two of 60 MB at once between them."""
    path = tmp_path / "graph.onnx"
    text = """
        <ir_version: 10, opset_import: ["" : 21]>
        held (float[n,2] x, float[m,2] z) => (float[1,1] y) {
            a = Neg(x)
            b = Exp(a)
            c = ReduceMax(b)
            d = Mul(z, c)
            e = Sub(z, c)
            f = ReduceMax(d)
            g = ReduceMax(e)
            h = Add(f, g)
            i = Mul(x, h)
            j = Exp(i)
            y = ReduceMax(j)
        }
    """
    onnx.save(onnx.parser.parse_model(text), path)
    program = """
import sys, torch
from engines.onnxruntime import OnnxRuntimeEngine
def resident(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
engine = OnnxRuntimeEngine("held", sys.argv[1], arena=sys.argv[2] == "arena")
inputs = {"x": torch.ones(8_000_000, 2), "z": torch.ones(7_500_000, 2)}
before = resident("VmRSS")
engine(inputs)
print(resident("VmHWM") - before, resident("VmRSS") - before)
"""

    def taken(kind: str) -> tuple[int, int]:
        command = [sys.executable, "-c", program, str(path), kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        most, after = map(int, done.stdout.split())
        return most, after

    most, after = taken("arena")
    assert most < 150e6, "three of them at once are 184 MB"
    assert after < 0.7 * most, "a call gives back all but the arena's first piece"
    assert taken("none")[0] > 170e6, "or this test shows nothing"
