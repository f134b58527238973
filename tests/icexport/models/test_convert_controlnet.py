"""ControlNets of any container become clean safetensors, or say why not."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from safetensors import safe_open
from torch import Tensor

from icexport.errors import CheckpointError, UsageError
from icexport.models.convert import convert
from tests.icexport.models.converting import (
    RunsCode,
    convert_payload,
    leftovers,
    payload,
)


@pytest.fixture
def controlnet(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = ControlNetModel(
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
        conditioning_embedding_out_channels=(8, 8),
    )
    model.save_pretrained(tmp_path / "controlnet")
    return tmp_path / "controlnet"


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def to_pickle(folder: Path, name: str) -> dict[str, Tensor]:
    state = ControlNetModel.from_pretrained(folder).state_dict()
    torch.save(state, folder / name)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    return state  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "controlnet_state_dict.pt"]
)
def test_controlnet_folder(tmp_path: Path, controlnet: Path, name: str) -> None:
    expected = ControlNetModel.from_pretrained(controlnet).state_dict()
    if not name.endswith(".safetensors"):
        to_pickle(controlnet, name)
    ema = {
        "decay": 0.9999,
        "inv_gamma": 1.0,
        "min_decay": 0.0,
        "optimization_step": 10000,
        "power": 0.66,
        "update_after_step": 0,
        "use_ema_warmup": False,
    }
    edit_config(controlnet, **ema)
    report = convert(controlnet, tmp_path / "clean", cond="hed")
    assert (report.kind, report.tensors) == ("controlnet", len(expected))
    assert report.source_sha256 == hashlib.sha256((controlnet / name).read_bytes()).hexdigest()
    config = json.loads((tmp_path / "clean" / "config.json").read_text())
    assert not ema.keys() & config.keys()
    assert leftovers(tmp_path / "clean") == ["config.json", "diffusion_pytorch_model.safetensors"]
    loaded = ControlNetModel.from_pretrained(tmp_path / "clean", use_safetensors=True).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())
    with safe_open(tmp_path / "clean" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "source": name,
            "source_sha256": report.source_sha256,
            "condition": "hed",
        }


def test_controlnet_tensors_that_share_memory(tmp_path: Path, controlnet: Path) -> None:
    state = to_pickle(controlnet, "diffusion_pytorch_model.bin")
    state["mid_block.resnets.0.norm1.weight"] = state["mid_block.resnets.1.norm1.weight"]
    torch.save(state, controlnet / "diffusion_pytorch_model.bin")
    assert convert(controlnet, tmp_path / "clean").tensors == len(state)


def test_controlnet_weights_without_config(tmp_path: Path, controlnet: Path) -> None:
    to_pickle(controlnet, "controlnet_state_dict.pt")
    (controlnet / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config.json that says.*pass the folder"):
        convert(controlnet, tmp_path / "clean")
    with pytest.raises(CheckpointError, match=r"taken to be Stable Diffusion 1's: .*--model-config"):
        convert(controlnet / "controlnet_state_dict.pt", tmp_path / "clean")


def remove_weights(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()


def truncate_weights(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def pickle_code(folder: Path) -> None:
    remove_weights(folder)
    torch.save({"a": RunsCode(folder / "marker")}, folder / "diffusion_pytorch_model.bin")


def pickle_list(folder: Path) -> None:
    remove_weights(folder)
    torch.save([1], folder / "diffusion_pytorch_model.bin")


def widen(folder: Path) -> None:
    edit_config(folder, block_out_channels=[32, 64])


def empty_blocks(folder: Path) -> None:
    edit_config(folder, block_out_channels=[], down_block_types=[])


def unet_class(folder: Path) -> None:
    edit_config(folder, _class_name="UNet2DConditionModel")


def garble_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_weights, "has no weights"),
        (truncate_weights, "diffusion_pytorch_model.safetensors.*cut short"),
        (pickle_code, "diffusion_pytorch_model.bin asks for [a-z.]*getattr"),
        (pickle_list, "expected a dict of tensors"),
        (widen, r"does not fit.*\n  controlnet_down_blocks.3.bias: shape \[32\], expected \[64\]"),
        (empty_blocks, "config.json does not describe a ControlNet"),
        (unet_class, "Cannot load UNet2DConditionModel|do not fit UNet2DConditionModel"),
        (garble_config, "Cannot read .*config.json"),
    ],
)
def test_damaged_controlnet(tmp_path: Path, controlnet: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(controlnet)
    with pytest.raises(CheckpointError, match=message):
        convert(controlnet, tmp_path / "clean")
    assert not (controlnet / "marker").exists()
    assert leftovers(tmp_path) == ["controlnet"]


def test_folders_with_nothing_to_convert(tmp_path: Path, controlnet: Path) -> None:
    convert_payload(tmp_path, payload())
    with pytest.raises(UsageError, match="nothing to convert"):
        convert(tmp_path / "probe", tmp_path / "clean")
    with pytest.raises(UsageError, match="no align model, which taps"):
        convert(controlnet, tmp_path / "clean", taps="attn")
    shutil.rmtree(controlnet)
    controlnet.mkdir()
    with pytest.raises(CheckpointError, match=r"no config.json"):
        convert(controlnet, tmp_path / "clean")
