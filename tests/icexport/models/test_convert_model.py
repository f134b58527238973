"""`icexport convert` takes what `icexport build` takes: base models and components in any layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionPipeline

from icexport.errors import CheckpointError, UsageError
from icexport.models.convert import convert
from icexport.models.source import ModelSource
from tests.icexport.models.layouts import assert_same, save, shard
from tests.icexport.models.originals import original_controlnet, original_vae, single_file, state_of


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_single_file(tiny_model: Path, tmp_path: Path, suffix: str) -> None:
    file = save(single_file(tiny_model), tmp_path / f"model.{suffix}")

    report = convert(file, tmp_path / "out", model_config=str(tiny_model))

    assert (report.kind, report.output) == ("model", tmp_path / "out")
    assert report.values == sum(tensor.numel() for tensor in single_file(tiny_model).values())
    options = {"controlnet": str(tiny_model / "controlnet-canny"), "probe": "none"}
    assert_same(ModelSource.find("canny", str(tmp_path / "out"), **options), tiny_model)
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(theirs.scheduler).__name__ == "UniPCMultistepScheduler"
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".bin", ".ckpt")]


def test_it_keeps_the_precision(tiny_model: Path, tmp_path: Path) -> None:
    file = save({n: t.half() for n, t in single_file(tiny_model).items()}, tmp_path / "model.safetensors")

    convert(file, tmp_path / "out", model_config=str(tiny_model))

    for part in ("unet", "vae", "text_encoder"):
        assert {t.dtype for t in state_of(tmp_path / "out" / part).values()} == {torch.float16}


def test_a_folder_of_shards_variants_and_pickles(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    states = {part: state_of(model / part) for part in ("unet", "vae", "text_encoder", "controlnet-canny")}
    for part in states:
        next((model / part).glob("*.safetensors")).unlink()
    shard(model / "unet", "unet", "safetensors", states["unet"])
    save(states["vae"], model / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    save(states["text_encoder"], model / "text_encoder" / "pytorch_model.bin")
    shard(model / "controlnet-canny", "controlnet-canny", "bin", states["controlnet-canny"])

    convert(model, tmp_path / "out")
    convert(model / "controlnet-canny", tmp_path / "out" / "controlnet-canny")

    assert_same(ModelSource.find("canny", str(tmp_path / "out"), probe="none"), tiny_model)
    names = [path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.safetensors")]
    assert sorted(names) == [
        "controlnet-canny/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_files_of_components(tiny_model: Path, tmp_path: Path) -> None:
    control = save(original_controlnet(tiny_model / "controlnet-canny"), tmp_path / "control.pth")
    vae = save(original_vae(tiny_model / "vae"), tmp_path / "vae.ckpt")

    reports = [
        convert(file, tmp_path / name, model_config=str(tiny_model))
        for name, file in (("controlnet", control), ("vae", vae))
    ]

    assert [report.kind for report in reports] == ["controlnet", "vae"]
    for name, kind, part in (("controlnet", ControlNetModel, "controlnet-canny"), ("vae", AutoencoderKL, "vae")):
        found, expected = (kind.from_pretrained(f).state_dict() for f in (tmp_path / name, tiny_model / part))
        assert all(torch.equal(found[n], tensor) for n, tensor in expected.items())
    with pytest.raises(CheckpointError, match=r"taken to be Stable Diffusion 1's: .*--model-config"):
        convert(vae, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(UsageError, match=r"is a text encoder\. Convert it as a part of its model"):
        convert(save(state_of(tiny_model / "text_encoder"), tmp_path / "clip.safetensors"), tmp_path / "wrong")


def test_folders_of_components(tiny_model: Path, tmp_path: Path) -> None:
    for part in ("unet", "vae", "text_encoder"):
        report = convert(tiny_model / part, tmp_path / part)
        assert report.kind == part
        assert report.tensors == len(state_of(tiny_model / part))
        found, expected = state_of(tmp_path / part), state_of(tiny_model / part)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_only_what_a_conversion_wrote_is_replaced(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    with pytest.raises(UsageError, match="holds more than a conversion writes"):
        convert(tiny_model, model, force=True)
    convert(tiny_model, tmp_path / "out")
    with pytest.raises(UsageError, match="exists"):
        convert(tiny_model, tmp_path / "out")
    convert(tiny_model, tmp_path / "out", force=True)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_converted_from"] == tiny_model.name
