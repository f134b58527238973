from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from engines.base import TensorSpec
from engines.onnxruntime import OnnxRuntimeEngine
from engines.torch_eager import TorchEngine
from icexport.backends.engines import load_engine
from icexport.bundle.store import Bundle
from icexport.errors import ExportError
from icexport.export.onnx import export_graph
from icexport.export.precision import read_precision
from icexport.graphs.graph import Graph, example_inputs, size_of
from icexport.graphs.profile import Profile, SizeRange
from icexport.graphs.split import split
from icexport.graphs.stable_diffusion import GRAPH_NAMES, probe_graph, vae_decoder_graph
from icexport.models.precision import PRECISIONS
from icexport.models.probe import InnerControlProbe
from icexport.models.source import ModelSource
from icexport.parity.cases import cases
from icexport.parity.compare import compare, expect, relative_error
from tests.tiny_models import tiny_probe, tiny_unet

PROFILE = Profile(SizeRange(1, 1, 2), SizeRange(16, 16, 16), SizeRange(16, 16, 16))
SYMBOLS = PROFILE.symbols(4)


def shapes(values: list[onnx.ValueInfoProto]) -> dict[str, list[str | int]]:
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def test_size_of() -> None:
    assert [size_of(d, {"rows": 5}) for d in (7, "rows", "4*rows")] == [7, 5, 20]
    with pytest.raises(ValueError, match="not a dimension"):
        size_of("rows+1", {"rows": 5})


def test_example_inputs_are_seeded() -> None:
    specs = (
        TensorSpec("sample", torch.float16, ("samples", 4, "2*rows")),
        TensorSpec("timestep", torch.float32, ("samples",)),
        TensorSpec("input_ids", torch.int64, ("prompts", 12)),
        TensorSpec("clip_skip", torch.int64, ()),
    )
    symbols = {"samples": 2, "prompts": 1, "rows": 3}
    found, again, other = (example_inputs(specs, symbols, seed) for seed in (1, 1, 2))

    assert [tuple(t.shape) for t in found.values()] == [(2, 4, 6), (2,), (1, 12), ()]
    assert [t.dtype for t in found.values()] == [spec.dtype for spec in specs]
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert not torch.equal(found["sample"], other["sample"])
    assert found["timestep"].tolist() == [500, 500]
    assert found["clip_skip"] in (0, 1)


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_symbols_are_in_the_file(tiny_bundle: Path, name: str) -> None:
    bundle = Bundle(tiny_bundle)
    entry = bundle.graph(name)
    model = onnx.load(bundle.onnx(name), load_external_data=False)
    values = {"rows": 4, "columns": 4}

    def fixed(shape: tuple[str | int, ...]) -> list[str | int]:
        return [d if d in ("samples", "pictures", "prompts") else size_of(d, values) for d in shape]

    assert shapes(model.graph.input) == {tensor.name: fixed(tensor.shape) for tensor in entry.inputs}
    assert shapes(model.graph.output) == {tensor.name: fixed(tensor.shape) for tensor in entry.outputs}
    assert [o.version for o in model.opset_import if not o.domain] == [21]


def test_free_sizes_are_symbols(dynamic_bundle: Path) -> None:
    model = onnx.load(dynamic_bundle / "graphs" / "controlnet.onnx", load_external_data=False)
    found = shapes(model.graph.input)

    assert found["sample"] == ["samples", 4, "2*rows", "2*columns"]
    assert found["control_map"] == ["samples", 3, "4*rows", "4*columns"]
    assert found["residual_scale"] == ["samples", 5]


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_weights_lie_beside_the_graph(tiny_bundle: Path, name: str) -> None:
    path = tiny_bundle / "graphs" / f"{name}.onnx"
    model = onnx.load(path, load_external_data=False)
    large = [
        t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL and len(t.raw_data) > 1024
    ]

    assert not large
    assert {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"} == {
        f"{name}.onnx.data"
    }
    onnx.checker.check_model(str(path))


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_origins_are_forgotten_but_not_the_modules(tiny_bundle: Path, name: str) -> None:
    content = (tiny_bundle / "graphs" / f"{name}.onnx").read_bytes()

    for needle in (b"stack_trace", b"fx_node", b"site-packages", b".py", str(Path(__file__).parents[3]).encode()):
        assert needle not in content, needle
    assert b"pkg.torch.onnx.name_scopes" in content, "without these a bad layer cannot be named"


@pytest.mark.parametrize(
    ("pictures", "height", "width"), [(1, 16, 16), (3, 20, 28), (2, 32, 16), (1, 16, 32), (4, 32, 32)]
)
def test_free_sizes_run_like_torch(
    dynamic_bundle: Path, tiny_model: Path, pictures: int, height: int, width: int
) -> None:
    bundle = Bundle(dynamic_bundle)
    source = ModelSource.find("canny", str(tiny_model), probe="none")
    symbols = {"samples": 2 * pictures, "pictures": pictures, "prompts": pictures}
    symbols |= {"rows": height // 4, "columns": width // 4}
    for graph in split(source, torch.float32):
        inputs = example_inputs(graph.inputs, symbols, seed=height)
        expected = TorchEngine(graph.name, graph.module, graph.inputs, graph.outputs)(inputs)
        found = load_engine(bundle, graph.name)(inputs)
        for name, value in expected.items():
            assert relative_error(found[name], value) < 1e-4, f"{graph.name}.{name}"


def test_fp16(tiny_model: Path, tmp_path: Path) -> None:
    source = ModelSource.find("canny", str(tiny_model))
    half, full = (vae_decoder_graph(source.vae(dtype), 2, dtype) for dtype in (torch.float16, torch.float32))
    path = tmp_path / "vae_decoder.onnx"

    export_graph(half, path, SYMBOLS)

    counts = read_precision(path, PRECISIONS["fp16"])
    assert counts["float16"] > 10_000
    assert counts.get("float", 0) < 100
    engine = OnnxRuntimeEngine("vae_decoder", path)
    assert {spec.dtype for spec in (*engine.inputs, *engine.outputs)} == {torch.float16}
    reference, own = (TorchEngine(g.name, g.module, g.inputs, g.outputs) for g in (full, half))
    found = compare(engine, expect(cases(full, PROFILE, 4), reference, own, PRECISIONS["fp16"]))["pixels"]
    assert found
    assert 1e-5 < found.error < 0.02, "float16 must differ from float32, but little"


def test_opset_23_and_a_probe_without_time(tmp_path: Path) -> None:
    unet = tiny_unet()
    config = dataclasses.replace(tiny_probe(unet).config, time_embed_dim=None)
    graph = probe_graph(InnerControlProbe(config).eval(), unet, torch.float32)
    path = tmp_path / "probe.onnx"

    export_graph(graph, path, SYMBOLS, 23)

    model = onnx.load(path, load_external_data=False)
    assert [o.version for o in model.opset_import if not o.domain] == [23]
    engine = OnnxRuntimeEngine("probe", path)
    assert [spec.name for spec in engine.inputs] == [spec.name for spec in graph.inputs]
    inputs = example_inputs(graph.inputs, {"samples": 1, "pictures": 1, "rows": 4, "columns": 4})
    expected = TorchEngine("probe", graph.module, graph.inputs, graph.outputs)(inputs)["reading"]
    torch.testing.assert_close(engine(inputs)["reading"], expected, rtol=1e-3, atol=1e-4)


class Untraceable(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x[: int(x.sum())] if x.mean() > 0 else -x,)


def test_what_torch_cannot_trace_is_named(tmp_path: Path) -> None:
    spec = TensorSpec("x", torch.float32, (4,))

    with pytest.raises(ExportError, match="The graph 'odd' could not be exported at opset 21"):
        export_graph(Graph("odd", Untraceable(), (spec,), (spec,)), tmp_path / "odd.onnx", {})


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x @ self.weight,)


def test_weights_are_not_held_after_the_export(tmp_path: Path) -> None:
    """The rewrite rules of the exporter, which are module-level, keep the graph that they saw last."""
    module, spec = Product(), TensorSpec("x", torch.float32, (4, 4))
    weight = weakref.ref(module.weight)

    export_graph(Graph("product", module, (spec,), (spec,)), tmp_path / "product.onnx", {})

    del module
    gc.collect()
    assert weight() is None
