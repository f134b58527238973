"""Bundles with TensorRT plans: built for other machines, shared between conditions, refused where they do not fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import engines.tensorrt.worker
import icexport
from engines.errors import BackendUnavailableError
from icexport.backends.engines import built_backends, default_device, load_engine
from icexport.backends.table import get
from icexport.backends.tensorrt import TensorRt, TensorRtRtx
from icexport.bundle.engine_store import EngineStore
from icexport.bundle.store import Bundle
from icexport.errors import BundleError, DamagedBundleError
from icexport.host.files import digest

GRAPHS = {"text_encoder", "controlnet", "unet", "probe", "vae_decoder"}


@pytest.fixture
def bundle(rtx_bundle: Path) -> Bundle:
    return Bundle(rtx_bundle)


def test_every_graph_has_a_plan(bundle: Bundle) -> None:
    entries = bundle.manifest.engines
    assert {entry.graph for entry in entries.values()} == GRAPHS
    for key, entry in entries.items():
        assert (entry.backend, entry.device) == ("tensorrt-rtx", "sm_86+sm_89")
        assert entry.version == get("tensorrt-rtx").check().version
        assert entry.files == [f"engines/{key}/engine.plan", f"engines/{key}/engine.json"]
        assert entry.report["precision"]["fp16"] > entry.report["precision"].get("fp32", 0)
        assert entry.report["read_from"] == "network"
        assert json.loads((bundle.path / entry.files[1]).read_text()) == entry.report
        assert entry.made_from == entry.report["made_from"]
        assert digest(entry.made_from) == key
        assert (bundle.path / entry.files[0]).stat().st_size == entry.report["plan_bytes"]
    bundle.verify()


def test_parity_of_plans_that_cannot_run_is_open(bundle: Bundle) -> None:
    assert bundle.manifest.parity["tensorrt-rtx"] == {}
    checked = bundle.manifest.parity["simulation"]
    assert checked.keys() == GRAPHS
    assert all(output.passed for graph in checked.values() for output in graph.values())


def test_a_bundle_of_plans_wants_a_gpu(bundle: Bundle) -> None:
    assert built_backends(bundle) == ("tensorrt-rtx",)
    assert default_device(bundle, "auto") == default_device(bundle, "tensorrt-rtx") == "cuda"
    with pytest.raises(BackendUnavailableError, match="cannot use device 'cuda'"):
        load_engine(bundle, "unet", "tensorrt-rtx")
    with pytest.raises(BackendUnavailableError, match="'cpu'"):
        icexport.InnerControlPipeline.from_pretrained(bundle, device="cpu")


def test_another_condition_builds_its_controlnet_and_probe_only(
    bundle: Bundle, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "controlnet-canny").rename(model / "controlnet-lineart")
    (model / "probe-canny").rename(model / "probe-lineart")
    config = model / "probe-lineart" / "config.json"
    config.write_text(config.read_text().replace('"canny"', '"lineart"'))
    flip(model / "controlnet-lineart" / "diffusion_pytorch_model.safetensors")
    flip(model / "probe-lineart" / "probe.safetensors")
    built = []
    build = engines.tensorrt.worker.build

    def counted(request: Any, **rest: Any) -> Any:
        built.append(request.onnx.stem)
        return build(request, **rest)

    monkeypatch.setattr(engines.tensorrt.worker, "build", counted)
    store = tmp_path / "store"
    shutil.copytree(bundle.path.with_name("rtx-store"), store)
    options: dict[str, Any] = {"dtype": "fp16", "backend": "tensorrt-rtx", "target_sm": (86, 89), "verify": False}
    other = icexport.build("lineart", model=str(model), output=tmp_path / "lineart", engine_store=store, **options)

    assert built == ["controlnet", "probe"]
    same = bundle.manifest.engines.keys() & other.manifest.engines.keys()
    assert {bundle.manifest.engines[key].graph for key in same} == GRAPHS - {"controlnet", "probe"}
    assert EngineStore(store).collect() == []
    shutil.rmtree(other.path)
    assert {row.key for row in EngineStore(store).collect()} == other.manifest.engines.keys() - same


def flip(path: Path) -> None:
    """Change the last byte of the weights."""
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def ada(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this machine had a GPU with sm_89."""
    found = replace(get("tensorrt-rtx").check(), usable=True, devices=("cuda",), reason="", fix="")
    monkeypatch.setattr(TensorRtRtx, "check", lambda _self: found)
    monkeypatch.setattr(TensorRt, "check", lambda _self: found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 9))


@pytest.mark.usefixtures("ada")
class TestRefusal:
    def test_a_plan_for_this_gpu_is_taken(self, bundle: Bundle) -> None:
        for key, entry in bundle.manifest.engines.items():
            assert get("tensorrt-rtx").refusal(bundle, key, entry, "cuda") == ""
            assert get("tensorrt-rtx").refusal(bundle, key, replace(entry, device="portable"), "cuda") == ""

    def test_another_gpu(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (12, 0))
        key, entry = next(iter(bundle.manifest.engines.items()))
        assert get("tensorrt-rtx").refusal(bundle, key, entry, "cuda") == (
            "it was built for sm_86+sm_89, and cuda is NVIDIA GeForce RTX 4090 (sm_120)"
        )
        with pytest.raises(BundleError, match=r"of unet .* cannot run here: .*sm_120.*icexport build --cond canny"):
            load_engine(bundle, "unet", "tensorrt-rtx", "cuda")

    def test_classic_plans_are_for_one_model_of_gpu(self, bundle: Bundle) -> None:
        key, entry = next(iter(bundle.manifest.engines.items()))
        classic = replace(entry, backend="tensorrt", device="NVIDIA GeForce RTX 4090 sm_89")
        assert get("tensorrt").refusal(bundle, key, classic, "cuda") == ""
        other = replace(classic, device="NVIDIA L4 sm_89")
        assert "built for NVIDIA L4 sm_89" in get("tensorrt").refusal(bundle, key, other, "cuda")

    def test_another_version(self, bundle: Bundle) -> None:
        key, entry = next(iter(bundle.manifest.engines.items()))
        assert (
            get("tensorrt-rtx")
            .refusal(bundle, key, replace(entry, version="1.6"), "cuda")
            .startswith("it was built by tensorrt-rtx 1.6, and 1.7")
        )

    def test_other_weights(self, bundle: Bundle) -> None:
        keys = {entry.graph: key for key, entry in bundle.manifest.engines.items()}
        wrong = replace(bundle.manifest.engines[keys["controlnet"]], graph="unet")
        assert "made from another graph or other weights" in get("tensorrt-rtx").refusal(
            bundle, keys["controlnet"], wrong, "cuda"
        )
        assert "made from another graph" in get("tensorrt-rtx").refusal(
            bundle, keys["unet"], bundle.manifest.engines[keys["controlnet"]], "cuda"
        )

    def test_a_changed_plan(self, bundle: Bundle, tmp_path: Path) -> None:
        shutil.copytree(bundle.path, tmp_path / "copy")
        copy = Bundle(tmp_path / "copy")
        (entry,) = (e for e in copy.manifest.engines.values() if e.graph == "unet")
        flip(copy.path / entry.files[0])
        with pytest.raises(DamagedBundleError, match=r"engine\.plan was changed"):
            load_engine(copy, "unet", "tensorrt-rtx", "cuda")


def test_the_command_that_builds_it_again(bundle: Bundle, tiny_model: Path) -> None:
    words = bundle.manifest.rebuild_command(bundle.path, ["tensorrt-rtx"]).split()
    assert words[:5] == ["icexport", "build", "--cond", "canny", "--model"]
    assert str(tiny_model) in words
    pairs = list(pairwise(words))
    for pair in (("--backend", "tensorrt-rtx"), ("--dtype", "fp16"), ("--height", "16"), ("--batch-size", "1")):
        assert pair in pairs
    assert ("--output", str(bundle.path)) in pairs
