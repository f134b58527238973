"""``icexport inspect``, ``doctor``, ``convert`` and ``train``: what they tell, and what they refuse."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from icexport.bundle.store import Bundle
from icexport.cli import check
from icexport.errors import IcexportError
from icexport.models.probe import InnerControlProbe
from tests.icexport.models.converting import RunsCode
from tests.icexport.models.originals import state_of
from tests.steps import shown_steps


def document(icexport: Any, *args: object) -> dict[str, Any]:
    run = icexport(*args, "--json")
    assert run.exit_code == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def test_bundle(icexport, tiny_bundle: Path) -> None:
    found = document(icexport, "inspect", tiny_bundle)
    manifest = Bundle(tiny_bundle).manifest
    assert found["kind"] == "bundle"
    assert found["intact"] is True
    assert found["files"] == manifest.files
    assert found["graphs"]["unet"]["dtypes"] == manifest.graphs["unet"].dtypes
    run = icexport("inspect", tiny_bundle)
    for fact in (manifest.key, "onnxruntime", "edge F1", "batch 1:1:4, height 16, width 16", "noise_pred"):
        assert fact in run.stdout


@pytest.mark.parametrize("name", ["graphs/probe.onnx.data", "tokenizer/tokenizer.json"])
def test_a_damaged_bundle_names_the_file(icexport, tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    with (folder / name).open("r+b") as file:
        file.write(b"damage")
    run = icexport("inspect", folder)
    assert (run.exit_code, run.stdout) == (1, "")
    assert f"{name} was changed" in run.stderr


def test_model_folder(icexport, tiny_model: Path) -> None:
    found = document(icexport, "inspect", tiny_model)
    assert (found["kind"], found["class"]) == ("model", "StableDiffusionPipeline")
    parts = {part["component"]: part for part in found["components"]}
    probe = InnerControlProbe.from_pretrained(tiny_model / "probe-canny")
    assert parts["probe-canny"]["parameters"] == sum(p.numel() for p in probe.parameters())
    assert parts["unet"]["class"] == "UNet2DConditionModel"
    assert parts["text_encoder"]["class"] == "CLIPTextModel"
    assert {dtype for part in parts.values() for dtype in part["dtypes"]} == {"F32"}


def test_probe_folder_and_its_weights(icexport, tiny_model: Path) -> None:
    found = document(icexport, "inspect", tiny_model / "probe-canny")
    assert (found["kind"], found["config"]["condition"]) == ("probe", "canny")
    weights = document(icexport, "inspect", tiny_model / "probe-canny" / "probe.safetensors")
    assert weights["parameters"] == found["components"][0]["parameters"]
    assert weights["metadata"]["condition"] == "canny"
    assert sum(group["tensors"] for group in weights["groups"]) == weights["tensors"]


def test_onnx_file(icexport, tiny_bundle: Path) -> None:
    found = document(icexport, "inspect", tiny_bundle / "graphs" / "probe.onnx")
    entry = Bundle(tiny_bundle).manifest.graphs["probe"]
    assert [value["name"] for value in found["inputs"]] == [tensor.name for tensor in entry.inputs]
    assert found["outputs"][0] == {"name": "reading", "dtype": "float", "shape": ["pictures", 3, 8, 8]}
    assert found["opsets"]["ai.onnx"] == 21
    assert found["data_files"] == ["probe.onnx.data"]


def test_what_a_file_is(icexport, tiny_model: Path, tmp_path: Path) -> None:
    """Whatever it is, be it a pickle; code in one is not run."""
    state = state_of(tiny_model / "controlnet-canny")
    torch.save(state, tmp_path / "control.pth")
    save_file({"a.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    save_file({f"layers.{i}": torch.zeros(2) for i in range(3)}, tmp_path / "else.safetensors")
    torch.save({"a": RunsCode(tmp_path / "ran")}, tmp_path / "code.ckpt")

    found = document(icexport, "inspect", tmp_path / "control.pth")
    assert (found["kind"], found["is"]) == ("pickle", "a ControlNet")
    assert found["parameters"] == sum(tensor.numel() for tensor in state.values())
    assert document(icexport, "inspect", tmp_path / "lora.safetensors")["is"].startswith("a LoRA. Load it")
    assert document(icexport, "inspect", tmp_path / "else.safetensors")["is"] == "nothing that icexport knows"
    run = icexport("inspect", tmp_path / "code.ckpt")
    assert run.exit_code == 1
    assert "could run code, so it is refused" in " ".join(run.stderr.split())
    assert not (tmp_path / "ran").exists()


def test_a_folder_tells_what_would_be_read(icexport, tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    state = state_of(model / "unet")
    torch.save(state, weights.with_suffix(".bin"))
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    (model / "vae" / "diffusion_pytorch_model.safetensors").unlink()

    parts = {part["component"]: part for part in document(icexport, "inspect", model)["components"]}

    assert parts["unet"]["files"] == ["diffusion_pytorch_model.bin"], (
        "plain weights go before a variant, as in diffusers"
    )
    assert parts["unet"]["parameters"] == sum(tensor.numel() for tensor in state.values())
    assert "has no weights" in parts["vae"]["problem"]
    weights.with_suffix(".bin").unlink()
    parts = {part["component"]: part for part in document(icexport, "inspect", model)["components"]}
    assert parts["unet"]["variant"] == "fp16"


def test_damaged_and_unknown_things(icexport, tiny_model: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.copyfile(tiny_bundle / "graphs" / "probe.onnx", tmp_path / "alone.onnx")
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "alone.onnx").read_bytes()[:1000])
    (tmp_path / "empty.onnx").touch()
    weights = (tiny_model / "probe-canny" / "probe.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(weights[: len(weights) // 2])
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "config.json").write_text("{")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "nothing").mkdir()
    expected = {"alone.onnx": 1, "cut.onnx": 1, "empty.onnx": 1, "cut.safetensors": 1, "part": 1}
    for name, code in {**expected, "notes.txt": 2, "nothing": 2}.items():
        run = icexport("inspect", tmp_path / name)
        assert (name, run.exit_code, run.stdout) == (name, code, "")
        assert name in run.stderr


def test_doctor(icexport) -> None:
    found = document(icexport, "doctor")
    assert found["problems"] == []
    rows = {row["backend"]: row for row in found["backends"]}
    assert rows.keys() == {"tensorrt", "tensorrt-rtx", "onnxruntime", "torch"}
    assert rows["onnxruntime"]["usable"]
    assert rows["torch"]["usable"]
    assert all(row["usable"] or (row["missing"] and row["fix"]) for row in rows.values())
    assert found["packages"]["torch"]
    assert found["disk_free_GB"] > 0
    assert icexport("doctor").exit_code == 0


def test_doctor_fails_where_nothing_can_run(icexport, monkeypatch: pytest.MonkeyPatch) -> None:
    def torchvision() -> None:
        raise IcexportError("torchvision 9 does not fit. Run: pip uninstall torchvision")

    monkeypatch.setattr("icexport.host.preflight.check_torchvision", torchvision)
    monkeypatch.setattr(check, "_NEEDED", ("torch", "no_such_library"))
    run = icexport("doctor", "--json")
    assert run.exit_code == 1
    assert len(json.loads(run.stdout)["problems"]) == 2
    assert "no_such_library" in run.stderr
    assert "pip uninstall torchvision" in run.stderr


def test_a_broken_installation_is_told_before_the_work(icexport, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    def torchvision() -> None:
        raise IcexportError("torchvision 9 does not fit. Run: pip uninstall torchvision")

    monkeypatch.setattr("icexport.host.preflight.check_torchvision", torchvision)
    run = icexport("inspect", tmp_path)
    assert (run.exit_code, run.stderr) == (1, "Error: torchvision 9 does not fit. Run: pip uninstall torchvision\n")


def test_convert(icexport, tiny_model: Path, tmp_path: Path) -> None:
    args = ("convert", tiny_model / "controlnet-canny", "--cond", "canny", "--output", tmp_path / "new")
    found = document(icexport, *args)
    assert found["kind"] == "controlnet"
    assert found["config"]["_class_name"] == "ControlNetModel"
    assert (tmp_path / "new" / "config.json").is_file()
    again = icexport(*args)
    assert again.exit_code == 2
    assert "exists" in again.stderr
    forced = icexport(*args, "--force")
    assert forced.exit_code == 0
    assert shown_steps(forced.stderr) == ["convert controlnet-canny"]
    assert icexport(*args, "--force", "--taps", "attn").exit_code == 2
    assert icexport(*args, "--force", "--taps", "mlp").exit_code == 2
    unknown = icexport("convert", tiny_model / "controlnet-canny", "--cond", "pose", "--output", tmp_path / "pose")
    assert unknown.exit_code == 2
    assert "no condition 'pose'. Known conditions: canny, " in unknown.stderr


def test_train_needs_its_extra(icexport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "training.reference", None)
    monkeypatch.delattr("training.reference", raising=False)
    run = icexport("train", "base", "--work", tmp_path / "run")
    assert run.exit_code == 1
    assert "icexport[train]" in run.stderr


def test_train_base(icexport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []
    monkeypatch.setattr("training.reference.stages.train", lambda *args: calls.append(args))
    monkeypatch.setattr("training.reference.tokenizer.find_bpe_file", lambda: Path("bpe"))
    assert icexport("train", "base", "--work", tmp_path).exit_code == 0
    assert [args[:2] for args in calls] == [(tmp_path, tmp_path / "model")]
    recipe = tmp_path / "recipe.toml"
    for text in ("[vae", "[vae]\ncolour = 1"):
        recipe.write_text(text)
        run = icexport("train", "base", "--work", tmp_path, "--config", recipe)
        assert run.exit_code == 2, run.stderr
        assert "recipe.toml is not a recipe" in run.stderr
    assert len(calls) == 1
