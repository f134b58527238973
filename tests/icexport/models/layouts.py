"""Weights written in other layouts, and what they have to be read as."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from icexport.models.source import ModelSource
from tests.icexport.models.originals import state_of

F32 = torch.float32
CLASSES: dict[str, Any] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "controlnet-canny": ControlNetModel,
}
PARTS = tuple(CLASSES)
NAMES = {"text_encoder": ("model", "pytorch_model")}


def stem(part: str, kind: str) -> str:
    return NAMES.get(part, ("diffusion_pytorch_model",) * 2)[kind == "bin"]


def changed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the same shapes and other values: reading these would show."""
    return {name: tensor + 1 for name, tensor in state.items()}


def save(state: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata={"format": "pt"})
    else:
        torch.save(state, path)
    return path


def shard(folder: Path, part: str, kind: str, state: dict[str, Tensor], variant: str = "") -> list[str]:
    """Write a state in two shards with their index; return the names."""
    name, dot = stem(part, kind), f".{variant}" if variant else ""
    files = [f"{name}{dot}-0000{i}-of-00002.{kind}" for i in (1, 2)]
    names = sorted(state)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for file, half in zip(files, halves, strict=True):
        save({n: state[n] for n in half}, folder / file)
    index = {
        "metadata": {"total_size": 0},
        "weight_map": {n: f for f, h in zip(files, halves, strict=True) for n in h},
    }
    (folder / f"{name}.{kind}.index{dot}.json").write_text(json.dumps(index))
    return [*files, f"{name}.{kind}.index{dot}.json"]


def parts_of(source: ModelSource) -> dict[str, nn.Module]:
    return {
        "unet": source.unet(F32),
        "vae": source.vae(F32),
        "text_encoder": source.text_encoder(F32),
        "controlnet-canny": source.controlnet_model(F32),
    }


def assert_same(source: ModelSource, tiny_model: Path, parts: tuple[str, ...] = PARTS) -> None:
    """All values are those of the tiny model, and as many are counted."""
    found, elements = parts_of(source), source.elements()
    for part in parts:
        expected = CLASSES[part].from_pretrained(tiny_model / part).state_dict()
        state = found[part].state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected), part
        assert elements[part.removesuffix("-canny")] == sum(t.numel() for t in state_of(tiny_model / part).values())
