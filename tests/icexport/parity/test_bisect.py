from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import external_data_helper, numpy_helper

from icexport.bundle.store import Bundle
from icexport.graphs.graph import Graph
from icexport.graphs.split import split
from icexport.graphs.stable_diffusion import GRAPH_NAMES
from icexport.models.source import ModelSource
from icexport.parity import bisect
from icexport.parity.cases import Case, cases


@pytest.fixture(scope="module")
def all_graphs(tiny_model: Path) -> dict[str, Graph]:
    source = ModelSource.find("canny", str(tiny_model))
    return {graph.name: graph for graph in split(source, torch.float32)}


def case_of(graph: Graph, bundle: Path) -> Case:
    return next(cases(graph, Bundle(bundle).manifest.profile, 4))


def perturb(folder: Path, graph: str, weight: str) -> Path:
    """Change one weight tensor of an ONNX file, in its external data."""
    path = folder / f"{graph}.onnx"
    model = onnx.load(path)
    (tensor,) = [t for t in model.graph.initializer if t.name == weight]
    changed = 1.5 * numpy_helper.to_array(tensor) + np.float32(0.1)
    tensor.CopyFrom(numpy_helper.from_array(changed, weight))
    path.unlink()
    Path(f"{path}.data").unlink()
    external_data_helper.convert_model_to_external_data(model, location=f"{graph}.onnx.data", size_threshold=256)
    onnx.save(model, path)
    return path


def first_bad(path: Path, graph: Graph, case: Case, allowed: float) -> str | None:
    return bisect.first_bad_module(onnx.load(path, load_external_data=False), path.parent, graph, case, allowed)


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_every_layer_with_weights_can_be_named(all_graphs: dict[str, Graph], tiny_bundle: Path, name: str) -> None:
    graph = all_graphs[name]
    found = set(bisect.module_outputs(onnx.load(tiny_bundle / f"graphs/{name}.onnx", load_external_data=False)))

    layers = {
        path
        for path, module in graph.module.named_modules()
        if list(module.parameters()) and not list(module.children()) and "vae.encoder" not in path
    }
    assert len(layers - found) <= 2, sorted(layers - found)


def test_of_modules_with_one_output_the_inner_one_comes_first(tiny_bundle: Path) -> None:
    graph = onnx.load(tiny_bundle / "graphs/vae_decoder.onnx", load_external_data=False)
    values = bisect.module_outputs(graph)
    names = list(values)
    pairs = [(inner, outer) for inner in names for outer in names if inner.startswith(f"{outer}.")]
    same = [(inner, outer) for inner, outer in pairs if values[inner] == values[outer]]
    assert same
    assert all(names.index(inner) < names.index(outer) for inner, outer in same)


def test_an_intact_graph_has_no_bad_layer(all_graphs: dict[str, Graph], tiny_bundle: Path) -> None:
    graph = all_graphs["controlnet"]

    path = tiny_bundle / "graphs" / "controlnet.onnx"
    assert first_bad(path, graph, case_of(graph, tiny_bundle), 1e-4) is None
    assert first_bad(path, graph, case_of(graph, tiny_bundle), 0.0) is not None


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("controlnet", "controlnet.conv_in"),  # first of all: what comes from text and time stays right behind it
        ("controlnet", "controlnet.mid_block.resnets.1.conv2"),
        ("controlnet", "controlnet.controlnet_cond_embedding.blocks.0"),
        ("vae_decoder", "vae.decoder.up_blocks.0.resnets.1.conv1"),
        ("vae_decoder", "vae.decoder.mid_block.attentions.0.to_out.0"),  # what holds it has the same output
    ],
)
def test_the_perturbed_layer_is_named(
    all_graphs: dict[str, Graph], tiny_bundle: Path, tmp_path: Path, name: str, layer: str
) -> None:
    folder = Path(shutil.copytree(tiny_bundle / "graphs", tmp_path / "graphs"))
    path = perturb(folder, name, f"{layer}.bias")
    graph = all_graphs[name]

    assert first_bad(path, graph, case_of(graph, tiny_bundle), 1e-4) == layer
    assert not any(module._forward_hooks for module in graph.module.modules())


def test_nothing_is_written_beside_the_graph(all_graphs: dict[str, Graph], tiny_bundle: Path, tmp_path: Path) -> None:
    """A bundle may lie on a read-only disk."""
    folder = Path(shutil.copytree(tiny_bundle / "graphs", tmp_path / "graphs"))
    folder.chmod(0o555)
    before = sorted(folder.iterdir())
    graph = all_graphs["vae_decoder"]

    assert first_bad(folder / "vae_decoder.onnx", graph, case_of(graph, tiny_bundle), 0.0)

    assert sorted(folder.iterdir()) == before
    folder.chmod(0o755)


def test_modules_that_run_twice_are_left_out() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.pair = torch.nn.SiLU(), torch.nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.pair((x, x))
            return self.act(self.act(x))

    assert bisect._record(Twice(), [torch.ones(2)], ["act", "pair", ""]).keys() == {""}
