from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from engines.errors import EngineError
from engines.onnxruntime import OnnxRuntimeEngine
from icexport.errors import ExportError
from icexport.export.onnx import export_graph
from icexport.export.plugins import export_plugin_graph, inline_plugins, plugin_names
from icexport.export.precision import read_precision
from icexport.graphs.graph import Graph, example_inputs
from icexport.graphs.profile import SizeRange
from icexport.graphs.stable_diffusion import ProbeGraph, probe_graph
from icexport.models.fused_probe import FusedProbe
from icexport.models.precision import PRECISIONS
from icexport.models.probe import InnerControlProbe
from icexport.parity.compare import FACTOR, relative_error
from tests.tiny_models import tiny_probe, tiny_unet

SYMBOLS = {name: SizeRange.parse(text) for name, text in {"pictures": "1:2:3", "rows": "2", "columns": "3"}.items()}
NAMES = ("icexport::dual_projection", "icexport::residual_mix", "icexport::resize_group_norm_relu")


def graph_of(dtype: torch.dtype = torch.float32, **changes: Any) -> Graph:
    """Same random weights in every precision; dims and projection differ in some layers and agree in others."""
    unet = tiny_unet()
    torch.manual_seed(5)
    probe = InnerControlProbe(replace(tiny_probe(unet).config, **changes))
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return probe_graph(probe.to(dtype).eval(), unet, dtype)


def saved(graph: Graph, path: Path, opset: int = 21) -> onnx.ModelProto:
    export_plugin_graph(graph, path, SYMBOLS, opset)
    return onnx.load(path)


def inputs_of(graph: Graph, batch: int) -> dict[str, torch.Tensor]:
    return example_inputs(graph.inputs, {"pictures": batch, "rows": 2, "columns": 3}, seed=batch)


@pytest.fixture(scope="module")
def plugin_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugins") / "probe.plugins.onnx"
    export_plugin_graph(graph_of(), path, SYMBOLS)
    return path


@torch.no_grad()
def reading(graph: Graph, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    result: torch.Tensor = graph.module(*inputs.values())[0]
    return result


@pytest.mark.parametrize(
    ("changes", "opset"),
    [({}, 21), ({"time_embed_dim": None, "output_scale": 2, "head_tanh": False}, 23)],
    ids=["usual", "no time, twice as large"],
)
def test_inlined_definitions_equal_torch(tmp_path: Path, changes: dict[str, Any], opset: int) -> None:
    graph = graph_of(**changes)
    model = inline_plugins(saved(graph, tmp_path / "probe.plugins.onnx", opset))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, tmp_path / "twin.onnx")
    export_graph(graph, tmp_path / "probe.onnx", SYMBOLS, opset)

    twin, plain = (OnnxRuntimeEngine("probe", tmp_path / f"{name}.onnx") for name in ("twin", "probe"))

    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    assert not model.functions
    described = [[str(spec) for spec in (*engine.inputs, *engine.outputs)] for engine in (twin, plain)]
    assert described[0] == described[1]
    for batch in (1, 2, 3):
        inputs = inputs_of(graph, batch)
        expected = reading(graph, inputs)
        for engine in (twin, plain):
            found = engine(inputs)["reading"]
            assert found.shape == expected.shape
            assert relative_error(found, expected) < 1e-5


def test_half_precision_stays_in_its_band(tmp_path: Path) -> None:
    half, exact = graph_of(torch.float16), graph_of(torch.float64)
    path = tmp_path / "probe.plugins.onnx"
    onnx.save(inline_plugins(saved(half, path)), tmp_path / "twin.onnx")

    counts = read_precision(path, PRECISIONS["fp16"])
    assert counts["float16"] > 10_000
    assert "float" not in counts
    engine = OnnxRuntimeEngine("probe", tmp_path / "twin.onnx")
    assert {spec.dtype for spec in (*engine.inputs, *engine.outputs)} == {torch.float16}
    for batch in (1, 3):
        inputs = inputs_of(half, batch)
        expected = reading(exact, {name: value.double() for name, value in inputs.items()})
        own = relative_error(reading(half, inputs), expected)
        assert 1e-5 < own < 0.01
        assert relative_error(engine(inputs)["reading"], expected) < FACTOR * own


def test_nodes_say_what_the_parser_needs(plugin_file: Path) -> None:
    model = onnx.load(plugin_file)
    ours = [node for node in model.graph.node if node.domain]

    assert not model.functions, "with a definition, an engine without the plugin could be built"
    assert Counter(node.op_type for node in ours) == {
        "dual_projection": 8,
        "residual_mix": 4,
        "resize_group_norm_relu": 8,
    }
    assert [node.name for node in ours] == [f"{node.op_type}_{index}" for index, node in enumerate(ours)]
    for node in ours:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert (node.domain, attributes.pop("plugin_namespace"), attributes.pop("aot")) == ("icexport", b"icexport", 1)
        schema = getattr(torch.ops.icexport, node.op_type).default._schema.arguments
        tensors = [a.name for a in schema if isinstance(a.type, torch.TensorType)]
        assert list(attributes) == [a.name for a in schema if a.name not in tensors]
        assert len(node.input) == len(tensors)
        assert all(type(value) in (int, float) for value in attributes.values())
    mixes = [node for node in ours if node.op_type == "residual_mix"]
    assert [a.i for node in mixes for a in node.attribute if a.name == "index"] == [0, 1, 2, 3]
    # A twin with both kinds of shortcut, and with resizing, proves more.
    assert {a.i for node in mixes for a in node.attribute if a.name == "normalise_skip"} == {0, 1}


def test_weights_reach_the_plugins_as_initializers(plugin_file: Path) -> None:
    model = onnx.load(plugin_file)
    constants = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}

    for node in (node for node in model.graph.node if node.op_type == "dual_projection"):
        assert len(constants[node.input[1]]) == 2


def test_the_file_is_the_same_every_time_and_names_no_place(plugin_file: Path, tmp_path: Path) -> None:
    graph, path = graph_of(), tmp_path / plugin_file.name
    fused = replace(graph, module=ProbeGraph(FusedProbe(graph.module.probe)))  # type: ignore[arg-type]

    names = export_plugin_graph(fused, path, SYMBOLS)

    assert names == NAMES == plugin_names(onnx.load(plugin_file, load_external_data=False))
    for suffix in ("", ".data"):
        assert Path(f"{path}{suffix}").read_bytes() == Path(f"{plugin_file}{suffix}").read_bytes()
    for needle in (b"site-packages", b".py", str(Path(__file__).parents[3]).encode()):
        assert needle not in path.read_bytes()


def test_without_the_plugins_no_engine_takes_it(plugin_file: Path) -> None:
    with pytest.raises(EngineError, match="icexport"):
        OnnxRuntimeEngine("probe", plugin_file)


def test_inlining_leaves_the_model_alone(plugin_file: Path) -> None:
    model = onnx.load(plugin_file)
    before = model.SerializeToString()

    plain = inline_plugins(model)

    assert model.SerializeToString() == before
    assert plugin_names(plain) == ()


def test_what_does_not_go_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "probe.plugins.onnx"
    free = SYMBOLS | {"columns": SizeRange.parse("2:3:4")}

    with pytest.raises(ExportError, match="columns are 2:3:4 steps"):
        export_plugin_graph(graph_of(), path, free)
    with pytest.raises(ExportError, match="need opset 21 or later, got 20"):
        export_plugin_graph(graph_of(), path, SYMBOLS, 20)
    with pytest.raises(ExportError, match="Only the probe's graph has kernels, got 'other'"):
        export_plugin_graph(Graph("other", torch.nn.Identity(), (), ()), path, SYMBOLS)
    assert not list(tmp_path.iterdir())
