"""What the writer puts together: float32 islands, the plugin graph beside its twin, plans from the right file."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from icexport.backends.base import EngineRequest, Made, PlanOptions
from icexport.backends.tensorrt import TensorRt
from icexport.builder import writer as bundle_writer
from icexport.builder.mixed import Island
from icexport.builder.options import BuildOptions, BuildSpec
from icexport.builder.writer import write_bundle
from icexport.bundle.engine_store import EngineStore
from icexport.bundle.records import EngineEntry
from icexport.bundle.store import Bundle
from icexport.errors import ExportError
from icexport.gates import parity_gate as parity_gate_module
from icexport.gates.parity_gate import PLUGIN_GRAPH, expected_of, parity_gate
from icexport.graphs.graph import Graph
from icexport.graphs.profile import Profile
from icexport.graphs.split import split
from icexport.models.precision import precision
from icexport.models.source import ModelSource
from icexport.progress import silent


def spec_for(tiny_model: Path, dtype: str, **options: Any) -> BuildSpec:
    """As on a machine with classic TensorRT: `BuildSpec.of` would refuse it here."""
    found = BuildSpec.of("canny", BuildOptions(str(tiny_model), backends=["torch"], dtype=dtype, batch_size=1))
    return BuildSpec(found.source, ("tensorrt",), dtype, 21, found.profile, False, PlanOptions(**options))


@pytest.fixture(autouse=True)
def requests(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Notes what would be built, and builds nothing; of the graphs, only decoder and probe are exported."""
    noted: list[dict[str, Any]] = []

    def note(_self: TensorRt, request: EngineRequest, made: Made) -> EngineEntry:
        noted.append({"graph": request.graph, "file": made.onnx.name, "plugins": made.plugins})
        return EngineEntry(request.graph, "tensorrt", "10.13")

    def few(source: ModelSource, dtype: torch.dtype, profile: Profile) -> Iterator[Graph]:
        return (graph for graph in split(source, dtype, profile) if graph.name in ("probe", "vae_decoder"))

    monkeypatch.setattr(TensorRt, "make", note)
    monkeypatch.setattr(TensorRt, "target", lambda *_: "NVIDIA L4 sm_89")
    monkeypatch.setattr(bundle_writer, "split", few)
    monkeypatch.setattr(parity_gate_module, "split", few)
    monkeypatch.setattr(bundle_writer, "real_cases", lambda *_, **__: {"probe": [], "vae_decoder": []})
    return noted


def write(spec: BuildSpec, folder: Path) -> Bundle:
    folder.mkdir()
    write_bundle(spec, "key", folder, EngineStore(folder.with_name("store")), silent)
    return Bundle(folder)


def test_the_probe_has_a_graph_with_plugins_and_its_twin(
    tiny_model: Path, tmp_path: Path, requests: list[dict[str, Any]]
) -> None:
    spec = spec_for(tiny_model, "fp32")
    bundle = write(spec, tmp_path / "bundle")
    names = ("icexport::dual_projection", "icexport::residual_mix", "icexport::resize_group_norm_relu")
    assert requests == [
        {"graph": "probe", "file": "probe.plugins.onnx", "plugins": names},
        {"graph": "vae_decoder", "file": "vae_decoder.onnx", "plugins": ()},
    ]
    assert bundle.manifest.graphs["probe"].plugin_file == "graphs/probe.plugins.onnx"
    twin = onnx.load(bundle.onnx("probe"), load_external_data=False)
    assert {node.domain for node in twin.graph.node} == {""}
    expected = expected_of(spec.source, precision("fp32"), spec.profile, silent)
    results = parity_gate(bundle, spec.source, expected, spec.backends, silent)
    assert results["tensorrt"] == {}
    assert all(output.passed for output in results[PLUGIN_GRAPH]["probe"].values())
    assert all(output.passed for graph in results["onnxruntime"].values() for output in graph.values())


def test_no_plugins(tiny_model: Path, tmp_path: Path, requests: list[dict[str, Any]], monkeypatch: Any) -> None:
    monkeypatch.setattr(bundle_writer, "stabilise", lambda *_: [])
    bundle = write(spec_for(tiny_model, "fp16", plugins=False), tmp_path / "bundle")
    assert {row["plugins"] for row in requests} == {()}
    assert bundle.manifest.graphs["probe"].plugin_file is None
    assert not (bundle.path / "graphs" / "probe.plugins.onnx").exists()


def test_the_range_pass_finds_the_lowered_weights_gone(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in cycles, which nothing else would look for meanwhile: 1.7 GB of a UNet's."""
    lowered: list[weakref.ref[Any]] = []
    cast = Graph.cast

    def noted(graph: Graph, dtype: torch.dtype) -> Graph:
        found = cast(graph, dtype)
        found.module.itself = [found.module]  # a cycle, as hooks make them
        lowered.append(weakref.ref(found.module))
        return found

    left: list[bool] = []
    monkeypatch.setattr(Graph, "cast", noted)
    monkeypatch.setattr(bundle_writer, "stabilise", lambda *_: left.append(lowered[-1]() is not None) or [])
    gc.disable()
    try:
        write(spec_for(tiny_model, "fp16"), tmp_path / "bundle")
    finally:
        gc.enable()
    assert left == [False] * len(lowered)
    assert left


def test_islands_are_recorded_and_kernels_cannot_have_them(
    tiny_model: Path, tmp_path: Path, requests: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    island = Island("probe.output_head.0", "conv2d_9", "overflow", 70000.0, 3)
    monkeypatch.setattr(bundle_writer, "stabilise", lambda path, *_: [island] if path.stem == "probe" else [])
    bundle = write(spec_for(tiny_model, "fp16", plugins=False), tmp_path / "plain")
    assert bundle.manifest.graphs["probe"].islands == [island.to_json()]
    assert bundle.manifest.graphs["vae_decoder"].islands == []
    assert len(requests) == 2
    with pytest.raises(ExportError, match=r"probe needs float32 for probe\.output_head\.0.*--no-plugins"):
        write(spec_for(tiny_model, "fp16"), tmp_path / "kernels")
