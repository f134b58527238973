from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import icexport
from icexport.bundle.manifest import MANIFEST_NAME
from icexport.bundle.store import Bundle
from icexport.errors import BundleError, CheckpointError, DamagedBundleError, ParityError
from icexport.gates import parity_gate
from icexport.graphs.split import split
from tests.hashing import hash_files
from tests.steps import Told


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def rehash(folder: Path) -> None:
    """As an attacker or a wrong tool would: the files are changed, the hashes fit."""
    path = folder / MANIFEST_NAME
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"files": hash_files(folder)}))


def change_weight(folder: Path, graph: str, weight: str, factor: float) -> None:
    """Overwrite one tensor in the external data."""
    path = folder / "graphs" / f"{graph}.onnx"
    model = onnx.load(path, load_external_data=False)
    (tensor,) = [t for t in model.graph.initializer if t.name == weight]
    where = {entry.key: entry.value for entry in tensor.external_data}
    (loaded,) = [t for t in onnx.load(path).graph.initializer if t.name == weight]
    changed = (numpy_helper.to_array(loaded) * np.float32(factor)).tobytes()
    data = bytearray(Path(f"{path}.data").read_bytes())
    data[int(where["offset"]) : int(where["offset"]) + len(changed)] = changed
    Path(f"{path}.data").write_bytes(data)
    rehash(folder)


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Judge some graphs only, to be quick."""
    return lambda *names: monkeypatch.setattr(
        parity_gate, "split", lambda *args: (graph for graph in split(*args) if graph.name in names)
    )


def test_a_good_bundle_passes(tiny_bundle: Path) -> None:
    told = Told()

    found = icexport.verify(tiny_bundle, backend="onnxruntime", progress=told)

    graphs = list(Bundle(tiny_bundle).manifest.graphs)
    steps = [f"{step} {graph}" for step in ("reference", "parity") for graph in graphs]
    assert told.names == ["check the files", *steps]
    assert told.expected == len(told.names)
    recorded = Bundle(tiny_bundle).manifest.parity["onnxruntime"]
    assert found.keys() == {"onnxruntime"}
    assert {g: list(outputs) for g, outputs in found["onnxruntime"].items()} == {
        g: list(outputs) for g, outputs in recorded.items()
    }


def test_a_changed_weight_fails_and_is_named(copy: Path, only: Callable[..., None]) -> None:
    only("text_encoder", "controlnet", "probe")
    change_weight(copy, "controlnet", "controlnet.mid_block.resnets.0.conv1.weight", 1.5)

    with pytest.raises(ParityError, match=r"controlnet\.mid_residual on onnxruntime: cosine") as caught:
        icexport.verify(copy, backend=["onnxruntime"])

    message = str(caught.value)
    assert "First layer that differs: controlnet.mid_block.resnets.0.conv1." in message
    assert message.count("First layer") == 1
    assert "down_residual_0" not in message
    results = caught.value.results["onnxruntime"]
    assert results["controlnet"]["mid_residual"]["passed"] is False
    assert results["controlnet"]["down_residual_0"]["passed"] is True
    assert results["probe"]["reading"]["passed"] is True, "the other graphs are still judged"


def test_nan_weights_fail(copy: Path, only: Callable[..., None]) -> None:
    only("probe")
    change_weight(copy, "probe", "probe.output_head.0.weight", float("nan"))

    with pytest.raises(
        ParityError, match=r"probe\.reading .*NaN, infinite or missing.*layer.*probe\.output_head\.0\."
    ):
        icexport.verify(copy, backend="auto")


def test_a_missing_output_fails(copy: Path, only: Callable[..., None]) -> None:
    only("controlnet")
    (path,) = copy.glob("engines/*/controlnet.onnx")
    model = onnx.load(path, load_external_data=False)
    del model.graph.output[1]
    onnx.save(model, path)
    rehash(copy)

    with pytest.raises(ParityError, match=r"controlnet\.down_residual_1 on onnxruntime: .*missing"):
        icexport.verify(copy, backend="onnxruntime")


def test_damage_is_found_before_parity(copy: Path) -> None:
    (copy / "scheduler" / "scheduler_config.json").write_text("{}")

    told = Told()
    with pytest.raises(DamagedBundleError, match=r"scheduler_config\.json was changed"):
        icexport.verify(copy, progress=told)

    assert told.names == ["check the files"], "judged a damaged bundle"


def test_another_model_is_refused(tiny_bundle: Path, tiny_model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    config = other / "vae" / "config.json"
    config.write_text(config.read_text() + "\n")

    with pytest.raises(CheckpointError, match=r"is not the one .*different: vae/config\.json\. Give the right one"):
        icexport.verify(tiny_bundle, model=str(other))


def test_a_model_that_moved(copy: Path, tiny_model: Path, tmp_path: Path, only: Callable[..., None]) -> None:
    only("text_encoder")
    path = copy / MANIFEST_NAME
    data = json.loads(path.read_text())
    data["source"]["model"] = "/nowhere/model"
    path.write_text(json.dumps(data))

    with pytest.raises(CheckpointError, match="/nowhere/model is neither"):
        icexport.verify(copy)
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    assert icexport.verify(copy, model=str(moved), backend="onnxruntime")


def test_backends_that_were_not_built(dynamic_bundle: Path) -> None:
    with pytest.raises(BundleError, match="was built for onnxruntime, not for torch"):
        icexport.verify(dynamic_bundle, backend="torch")
