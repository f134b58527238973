"""Files of weights that are damaged, lack parts, or hold code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from icexport.errors import CheckpointError
from icexport.models.source import ModelSource
from tests.icexport.models.converting import RunsCode
from tests.icexport.models.layouts import F32, save, shard
from tests.icexport.models.originals import single_file, state_of


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_a_shard_is_missing(model: Path) -> None:
    state = state_of(model / "unet")
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    files = shard(model / "unet", "unet", "safetensors", state)
    (model / "unet" / files[1]).unlink()

    with pytest.raises(CheckpointError, match=r"lists 2 shards, and these are missing: .*-00002-of-00002"):
        ModelSource.find("canny", str(model))


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none(model: Path, text: str) -> None:
    (model / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(text)

    with pytest.raises(CheckpointError, match=r"index\.json is damaged: it lists no shards"):
        ModelSource.find("canny", str(model))


def test_an_index_that_leaves_the_folder(model: Path) -> None:
    index = {"weight_map": {"a": "../unet/diffusion_pytorch_model.safetensors"}}
    (model / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(CheckpointError, match="names files outside of its folder"):
        ModelSource.find("canny", str(model))


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_single_file_cut_short(tiny_model: Path, tmp_path: Path, suffix: str) -> None:
    file = save(single_file(tiny_model), tmp_path / f"model.{suffix}")
    file.write_bytes(file.read_bytes()[:-2000])

    with pytest.raises(CheckpointError, match="cut short"):
        ModelSource.find("canny", str(file), model_config=str(tiny_model))


@pytest.mark.parametrize("where", ["model", "controlnet", "vae", "bin"])
def test_code_in_a_pickle_is_not_run(model: Path, tmp_path: Path, where: str) -> None:
    marker = tmp_path / "ran"
    file = tmp_path / "file.ckpt"
    torch.save({"state_dict": {"a.b": torch.zeros(2)}, "extra": RunsCode(marker)}, file)
    options: dict[str, Any] = {where: str(file)}
    if where == "bin":
        (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        shutil.copyfile(file, model / "unet" / "diffusion_pytorch_model.bin")
        options = {}

    with pytest.raises(CheckpointError, match="could run code, so it is refused"):
        ModelSource.find("canny", **{"model": str(model), **options}).unet(F32)
    assert not marker.exists()


def test_a_single_file_that_lacks_tensors(tiny_model: Path, tmp_path: Path) -> None:
    state = single_file(tiny_model)
    gone = next(name for name in state if "out_layers.3.weight" in name)
    del state[gone]
    file = save(state, tmp_path / "model.safetensors")
    options = {"controlnet": str(tiny_model / "controlnet-canny"), "probe": "none"}
    source = ModelSource.find("canny", str(file), model_config=str(tiny_model), **options)

    with pytest.raises(CheckpointError, match="do not fit UNet2DConditionModel|Cannot load UNet2DConditionModel"):
        source.unet(F32)
