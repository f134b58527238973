from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from engines.base import TensorSpec
from engines.onnxruntime import OnnxRuntimeEngine
from engines.torch_eager import TorchEngine
from icexport.builder import mixed
from icexport.errors import ExportError
from icexport.export.onnx import export_graph
from icexport.export.precision import WIDE, read_precision
from icexport.export.widen import widen, widen_weights
from icexport.graphs.graph import Graph
from icexport.graphs.profile import Profile, SizeRange
from icexport.graphs.stable_diffusion import unet_graph, vae_decoder_graph
from icexport.models.precision import PRECISIONS
from icexport.parity.cases import Case, cases
from icexport.parity.compare import Expected, OutputParity, cast, compare, expect
from icexport.parity.session import open_session, run_session
from tests.tiny_models import TEXT_LENGTH, overflowing_unet, overflowing_vae

PROFILE = Profile(SizeRange(1, 1, 2), SizeRange(8, 8, 8), SizeRange(8, 8, 8))
MAKERS: dict[str, Callable[[torch.dtype], Graph]] = {
    "vae_decoder": lambda dtype: vae_decoder_graph(overflowing_vae().to(dtype), 1, dtype),
    "unet": lambda dtype: unet_graph(overflowing_unet().to(dtype), TEXT_LENGTH, None, dtype),
}


def engine_of(graph: Graph) -> TorchEngine:
    return TorchEngine(graph.name, graph.module, graph.inputs, graph.outputs)


def expected(full: Graph, case_list: list[Case]) -> list[Expected]:
    return list(expect(case_list, engine_of(full), None, PRECISIONS["fp16"]))


class Treated:
    """One adversarial model: its graphs, the file as exported, and the same after ``stabilise``."""

    def __init__(self, name: str, folder: Path) -> None:
        self.half, self.full = (MAKERS[name](dtype) for dtype in (torch.float16, torch.float32))
        self.cases = list(cases(self.full, PROFILE, 1))
        self.plain, self.path = (folder / kind / f"{name}.onnx" for kind in ("plain", "mixed"))
        self.plain.parent.mkdir(parents=True)
        export_graph(self.half, self.plain, PROFILE.symbols(1))
        shutil.copytree(self.plain.parent, self.path.parent)
        self.islands = mixed.stabilise(self.path, self.full, expected(self.full, self.cases), PRECISIONS["fp16"])

    def parity(self, path: Path) -> dict[str, OutputParity]:
        engine = OnnxRuntimeEngine(self.full.name, path)
        wanted = expect(self.cases, engine_of(self.full), engine_of(self.half), PRECISIONS["fp16"])
        return compare(engine, wanted)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Treated:
    return Treated("vae_decoder", tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Treated:
    return Treated("unet", tmp_path_factory.mktemp("unet"))


def proto(path: Path) -> onnx.ModelProto:
    return onnx.load(path, load_external_data=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_pure_float16_overflows_in_pytorch(vae: Treated, unet: Treated) -> None:
    for model in (vae, unet):
        own = engine_of(model.half)
        found = own(cast(model.cases[0].inputs, own))
        assert not found[model.half.outputs[0].name].isfinite().all()


def test_a_residual_stream_that_overflows(unet: Treated) -> None:
    before, after = unet.parity(unet.plain), unet.parity(unet.path)

    assert not before["noise_pred"].finite
    assert all(after.values())
    assert after["noise_pred"].error < 4e-3
    assert {island.reason for island in unet.islands} == {"overflow"}
    scopes = [island.scope for island in unet.islands]
    assert scopes[:3] == [
        "unet.mid_block.resnets.0.conv2",
        "unet.mid_block.resnets.0",
        "unet.mid_block.attentions.0.norm",
    ]
    assert "unet.mid_block.resnets.0.conv1" not in scopes
    assert not [scope for scope in scopes if "to_q" in scope or scope.startswith("unet.down_blocks")]
    nodes = sum(island.nodes for island in unet.islands)
    assert 10 < nodes < 0.15 * len(proto(unet.plain).graph.node)


def test_an_overflow_between_two_layers(vae: Treated) -> None:
    """ONNX Runtime on a CPU does not round between a convolution and a norm, and so does not see it; a GPU would."""
    name = "conv2d_2"
    session = open_session(proto(vae.plain), [name], vae.plain.parent)
    assert np.isinf(run_session(session, vae.cases[0].inputs)[0]).any()

    block = "vae.decoder.mid_block.resnets.0"
    assert [(island.scope, island.tensor, island.nodes) for island in vae.islands] == [
        (f"{block}.conv1", name, 1),
        (f"{block}.norm2", name, 1),
    ]
    assert vae.islands[0].measured == vae.islands[1].measured > 1e5
    assert all(vae.parity(vae.path).values())
    session = open_session(proto(vae.path), [name + WIDE], vae.path.parent)
    (wide,) = run_session(session, vae.cases[0].inputs)
    assert wide.dtype == np.float32
    assert np.isfinite(wide).all()


def test_islands_are_json(unet: Treated) -> None:
    text = json.dumps([island.to_json() for island in unet.islands], allow_nan=False)

    assert mixed.Island(**json.loads(text)[0]) == unet.islands[0]


def test_everything_else_is_bit_identical(unet: Treated) -> None:
    plain, treated = (onnx.load(path) for path in (unet.plain, unet.path))
    before, after = ({node.name: node for node in model.graph.node} for model in (plain, treated))

    changed = {name for name, node in before.items() if after[name] != node}
    assert len(changed) == sum(island.nodes for island in unet.islands)
    assert {after[name].op_type for name in after.keys() - before.keys()} == {"Cast"}
    old, new = ({t.name: t for t in model.graph.initializer} for model in (plain, treated))
    for name, tensor in new.items():
        if name in old:
            assert tensor.raw_data == old[name].raw_data
            continue
        assert name.endswith(WIDE)
        weight = numpy_helper.to_array(old[name.removesuffix(WIDE)])
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), weight.astype(np.float32))
    read = {name for node in treated.graph.node for name in node.input}
    assert new.keys() <= read, "no weight is there that nothing reads"
    for side in ("input", "output"):
        assert getattr(treated.graph, side) == getattr(plain.graph, side)


@pytest.mark.parametrize("name", ["vae", "unet"])
def test_the_file_is_valid(name: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(name).path

    onnx.checker.check_model(str(path), full_check=True)
    model = proto(path)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    kinds = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
    stated = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    assert stated.items() <= kinds.items()
    assert set(stated) >= {n for node in model.graph.node for n in node.output} - {o.name for o in model.graph.output}
    assert read_precision(path, PRECISIONS["fp16"])["float"] > 500


def test_the_same_input_gives_the_same_bytes(unet: Treated, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(unet.plain.parent, tmp_path / "copy"))

    islands = mixed.stabilise(folder / "unet.onnx", unet.full, expected(unet.full, unet.cases), PRECISIONS["fp16"])

    assert islands == unet.islands
    assert contents(folder) == contents(unet.path.parent)


def test_tensorrt_rtx_takes_the_file(unet: Treated) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(unet.path)), [str(parser.get_error(i)) for i in range(parser.num_errors)]
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if -1 in tensor.shape:
            profile.set_shape(tensor.name, *[[n if d == -1 else d for d in tensor.shape] for n in (1, 2, 2)])
    config.add_optimization_profile(profile)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    convolutions = [layer.get_output(0).dtype for layer in layers if layer.type == trt.LayerType.CONVOLUTION]
    assert {trt.float32, trt.float16} == set(convolutions)

    assert builder.build_serialized_network(network, config)


class Shift(nn.Module):
    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount = nn.Parameter(torch.tensor([amount]))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.amount


class Net(nn.Module):
    """``1 + conv``, and between the two what ``inner`` does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), inner, nn.Conv2d(4, 2, 1))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.net(x),)


def graph_of(inner: nn.Module) -> Graph:
    x, y = TensorSpec("x", torch.float32, (1, 3, 8, 8)), TensorSpec("y", torch.float32, (1, 2, 6, 6))
    return Graph("net", Net(inner).eval().requires_grad_(False), (x,), (y,))


def exported(full: Graph, folder: Path) -> tuple[Path, list[Case]]:
    half = dataclasses.replace(
        full,
        module=copy.deepcopy(full.module).half(),
        inputs=tuple(dataclasses.replace(spec, dtype=torch.float16) for spec in full.inputs),
    )
    export_graph(half, folder / "net.onnx", {})
    inputs = {"x": torch.randn((1, 3, 8, 8), generator=torch.Generator().manual_seed(1))}
    return folder / "net.onnx", [Case("one", inputs)]


def test_a_module_that_loses_its_digits_is_moved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing overflows at 1e4, but only the multiples of 8 are left there; both modules must move."""
    full = graph_of(nn.Sequential(Shift(1e4), nn.ReLU(), Shift(-1e4)))
    path, cases = exported(full, tmp_path)

    with caplog.at_level(logging.WARNING):
        islands = mixed.stabilise(path, full, expected(full, cases), PRECISIONS["fp16"])

    assert {island.reason for island in islands} == {"parity"}
    assert {island.tensor for island in islands} == {"y"}
    assert [island.scope for island in islands] == ["net.1.0", "net.1.1", "net.1.2"]
    assert all(island.measured is not None and island.measured > 0.01 for island in islands)
    engine = OnnxRuntimeEngine("net", path)
    assert compare(engine, expected(full, cases))["y"]
    assert "net.y: error 0.9" in caplog.text
    assert "first in 'net.1.2'" in caplog.text


def test_what_cannot_be_mended_stays_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The file does not hold the model's weights: no precision helps, and the gate will say so."""
    full = graph_of(nn.ReLU())
    path, cases = exported(full, tmp_path)
    full.module.get_parameter("net.0.weight").neg_()
    before = contents(tmp_path)

    assert mixed.stabilise(path, full, expected(full, cases), PRECISIONS["fp16"]) == []

    assert contents(tmp_path) == before
    assert "do not bring parity" in caplog.text


def test_a_weight_that_float16_cannot_hold(tmp_path: Path) -> None:
    full = graph_of(nn.ReLU())
    full.module.get_parameter("net.0.weight")[0, 0, 0, 0] = 1e5
    path, cases = exported(full, tmp_path)

    with pytest.raises(
        ExportError, match=r"'net' has weights above 65504.*net\.0\.weight\. Build with --dtype bf16 or fp32"
    ):
        mixed.stabilise(path, full, expected(full, cases), PRECISIONS["fp16"])


def test_an_output_that_float16_cannot_hold(tmp_path: Path) -> None:
    full = graph_of(Shift(6e4))
    full.module.get_parameter("net.2.weight").fill_(1.0)
    path, cases = exported(full, tmp_path)

    with pytest.raises(ExportError, match=r"Outputs of the graph 'net' exceed 65504.*y \(2\.\de\+05\).*--dtype bf16"):
        mixed.stabilise(path, full, expected(full, cases), PRECISIONS["fp16"])


def small_model() -> onnx.ModelProto:
    """``scores`` = masked ``x @ w`` to a Softmax, and ``large`` = 1000 (x @ w) w, in float16."""
    half, shape = TensorProto.FLOAT16, [2, 2]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Where", ["seen", "zero", "lowest"], ["mask"]),
        helper.make_node("Add", ["product", "mask"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["scores"]),
        helper.make_node("Mul", ["product", "thousand"], ["grown"]),
        helper.make_node("Transpose", ["grown"], ["turned"]),
        helper.make_node("MatMul", ["turned", "w"], ["again"]),
        helper.make_node("Div", ["again", "thousand"], ["large"]),
    ]
    for index, node in enumerate(nodes):
        node.name = f"n{index}"
    weights = {
        "w": np.array([[10, 0], [0, 20]], np.float16),
        "seen": np.array([[True, False], [True, True]]),
        "zero": np.float16(0),
        "lowest": np.float16(-65504),
        "thousand": np.float16(1000),
    }
    values = [v for node in nodes for v in node.output if v not in ("scores", "large")]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", half, shape)],
        [helper.make_tensor_value_info(name, half, shape) for name in ("scores", "large")],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
        value_info=[helper.make_tensor_value_info(name, half, shape) for name in values],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


def test_ranges(tmp_path: Path) -> None:
    case_list = [Case(str(n), {"x": n * torch.tensor([[1.0, -2.0], [0.5, 0.0]])}) for n in (0.5, 2.0)]

    peaks = mixed.measure(small_model(), case_list, tmp_path)

    assert peaks == pytest.approx(
        {"product": 80, "masked": 20, "scores": 1, "grown": 80_000, "again": 800_000, "large": 800}, rel=1e-3
    )
    found = mixed.out_of_range(small_model(), peaks)
    assert {index: finding.tensor for index, finding in found.items()} == {
        4: "grown",
        5: "turned",
        6: "again",
        7: "again",
    }
    assert not mixed.out_of_range(small_model(), {"grown": math.inf, "again": math.nan, "large": mixed.LIMIT})


def test_shared_weights_and_borders() -> None:
    model = small_model()

    mixed_model = widen(model, [4, 5, 6, 7])
    widen_weights(mixed_model, Path())

    onnx.checker.check_model(mixed_model, full_check=True)
    graph = mixed_model.graph
    kinds = {t.name: t.data_type for t in graph.initializer}
    assert kinds["w"] == TensorProto.FLOAT16
    assert kinds["w.fp32"] == TensorProto.FLOAT
    assert "thousand" not in kinds
    casts = [(node.input[0], node.output[0]) for node in graph.node if node.op_type == "Cast"]
    assert casts == [("product", "product.fp32"), ("large.fp32", "large")]
    assert list(graph.node[0].input) == ["x", "w"]
    engine = onnx.reference.ReferenceEvaluator(mixed_model)
    x = np.array([[1, -2], [0.5, 0]], np.float16)
    with np.errstate(over="ignore"):  # the mask: -65504 - 20
        scores, large = engine.run(None, {"x": x})
    assert large.dtype == scores.dtype == np.float16
    weight = np.diag([10.0, 20.0])
    np.testing.assert_allclose(large, (x @ weight).T @ weight, rtol=1e-3)


def test_attributes_follow() -> None:
    half = TensorProto.FLOAT16
    nodes = [
        helper.make_node("Cast", ["n"], ["x"], to=half),
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.float16([2]), "c")),
        helper.make_node("Mul", ["x", "c"], ["y"]),
    ]
    infos = [helper.make_tensor_value_info(name, half, [1]) for name in ("x", "c")]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("n", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("y", half, [1])],
        value_info=infos,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])

    converted = widen(model, range(3))

    onnx.checker.check_model(converted, full_check=True)
    assert [(node.op_type, list(node.output)) for node in converted.graph.node] == [
        ("Cast", ["x.fp32"]),
        ("Constant", ["c.fp32"]),
        ("Mul", ["y.fp32"]),
        ("Cast", ["y"]),
    ]
    assert widen(model, []) == model
