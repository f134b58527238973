from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from icexport.backends import table
from icexport.backends.engines import choose_backend, load_engine
from icexport.backends.torch_modules import torch_module
from icexport.bundle.manifest import MANIFEST_NAME
from icexport.bundle.records import EngineEntry
from icexport.bundle.store import Bundle
from icexport.errors import BundleError, DamagedBundleError
from icexport.graphs.graph import example_inputs
from icexport.graphs.stable_diffusion import GRAPH_NAMES

SYMBOLS = {"samples": 2, "pictures": 2, "prompts": 2, "rows": 4, "columns": 4}


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    return Bundle(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.mark.parametrize("graph", GRAPH_NAMES)
def test_both_backends_agree_and_are_as_described(tiny_bundle: Path, graph: str) -> None:
    bundle = Bundle(tiny_bundle)
    torch_engine, onnx_engine = (load_engine(bundle, graph, name) for name in ("torch", "onnxruntime"))
    inputs = example_inputs(torch_engine.inputs, SYMBOLS)

    assert [(s.name, s.dtype) for s in onnx_engine.inputs] == [(s.name, s.dtype) for s in torch_engine.inputs]
    assert [(s.name, s.dtype) for s in onnx_engine.outputs] == [(s.name, s.dtype) for s in torch_engine.outputs]
    expected = torch_engine(inputs)
    for name, found in onnx_engine(inputs).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-4)


def test_an_engine_may_refuse_the_device_it_would_run_on(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(_bundle: Bundle, _key: str, entry: EngineEntry, device: str) -> str:
        return f"{entry.graph} does not fit {device}"

    monkeypatch.setattr(table.get("torch"), "refusal", refusal)
    with pytest.raises(BundleError, match="unet does not fit cpu"):
        load_engine(Bundle(tiny_bundle), "unet", "torch", "cpu")


def test_choosing_a_backend(tiny_bundle: Path, dynamic_bundle: Path) -> None:
    assert choose_backend(Bundle(tiny_bundle), "auto", "cpu") == "onnxruntime"
    assert choose_backend(Bundle(tiny_bundle), "torch", "cpu") == "torch"
    assert choose_backend(Bundle(dynamic_bundle), "auto", "cpu") == "onnxruntime"
    with pytest.raises(BundleError, match=r"was built for onnxruntime, not for torch\. .*--backend torch"):
        choose_backend(Bundle(dynamic_bundle), "torch", "cpu")


def test_a_graph_that_is_not_there(dynamic_bundle: Path) -> None:
    with pytest.raises(BundleError, match="has no graph 'probe'; it has text_encoder, controlnet, unet, vae_decoder"):
        load_engine(Bundle(dynamic_bundle), "probe")


@pytest.mark.parametrize("file", ["graphs/probe.onnx", "graphs/probe.onnx.data"])
def test_damaged_graphs_are_not_run(copy: Bundle, file: str) -> None:
    data = bytearray((copy.path / file).read_bytes())
    data[len(data) // 2] ^= 1
    (copy.path / file).write_bytes(data)

    with pytest.raises(DamagedBundleError, match=f"{file} was changed"):
        load_engine(copy, "probe", "onnxruntime")
    load_engine(copy, "probe", "torch")
    load_engine(copy, "unet", "onnxruntime")


def test_damaged_weights_of_torch_are_not_loaded(copy: Bundle) -> None:
    (entry,) = [e for e in copy.manifest.engines.values() if (e.graph, e.backend) == ("probe", "torch")]
    weights = copy.path / next(f for f in entry.files if f.endswith(".safetensors"))
    extra = weights.with_name("more.safetensors")
    shutil.copyfile(weights, extra)
    with pytest.raises(DamagedBundleError, match=r"more\.safetensors was added"):
        load_engine(copy, "probe", "torch")
    extra.unlink()
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")

    with pytest.raises(DamagedBundleError, match=r"probe\.safetensors was changed"):
        load_engine(copy, "probe", "torch")


def test_an_engine_that_the_manifest_lost(copy: Bundle) -> None:
    path = copy.path / MANIFEST_NAME
    data = json.loads(path.read_text())
    data["engines"] = {k: e for k, e in data["engines"].items() if (e["graph"], e["backend"]) != ("probe", "torch")}
    path.write_text(json.dumps(data))

    with pytest.raises(BundleError, match="has no torch engine for probe"):
        load_engine(Bundle(copy.path), "probe", "torch")


def test_unknown_modules(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No PyTorch module is known for the graph 'vae_encoder'"):
        torch_module("vae_encoder", tmp_path, Bundle(tiny_bundle).manifest)
