"""Single files of Stable Diffusion, made of a folder of diffusers: tensors by the names that the authors gave them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

State = dict[str, Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def state_of(folder: Path) -> State:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]


def single_file(model: Path) -> State:
    """All tensors of a base model."""
    return {
        **{f"model.diffusion_model.{n}": t for n, t in original_unet(model / "unet").items()},
        **{f"first_stage_model.{n}": t for n, t in original_vae(model / "vae").items()},
        **{
            f"cond_stage_model.transformer.text_model.{n.removeprefix('text_model.')}": t
            for n, t in state_of(model / "text_encoder").items()
        },
    }


def original_unet(folder: Path) -> State:
    config = config_of(folder)
    layers, cross = config["layers_per_block"], ["CrossAttn" in kind for kind in config["up_block_types"]]

    def up(match: re.Match[str]) -> str:
        block, kind, layer, rest = int(match[1]), match[2], int(match[3]), match[4]
        if kind == "upsamplers":
            return f"output_blocks.{block * (layers + 1) + layers}.{2 if cross[block] else 1}.{rest}"
        place = f"output_blocks.{block * (layers + 1) + layer}.{int(kind == 'attentions')}"
        return f"{place}.{_resnet(rest) if kind == 'resnets' else rest}"

    names = {"conv_norm_out": "out.0", "conv_out": "out.2"}
    return _renamed(state_of(folder), [*_encoder(layers, names), (r"up_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", up)])


def original_controlnet(folder: Path) -> State:
    embedding = "controlnet_cond_embedding"
    rules: list[tuple[str, Callable[[re.Match[str]], str]]] = [
        (r"controlnet_down_blocks\.(\d+)\.(.*)", lambda m: f"zero_convs.{m[1]}.0.{m[2]}"),
        (r"controlnet_mid_block\.(.*)", lambda m: f"middle_block_out.0.{m[1]}"),
        (rf"{embedding}\.conv_in\.(.*)", lambda m: f"input_hint_block.0.{m[1]}"),
        (rf"{embedding}\.blocks\.(\d+)\.(.*)", lambda m: f"input_hint_block.{2 * int(m[1]) + 2}.{m[2]}"),
        (rf"{embedding}\.conv_out\.(.*)", lambda m: f"input_hint_block.14.{m[1]}"),
    ]
    layers = config_of(folder)["layers_per_block"]
    return _renamed(state_of(folder), [*rules, *_encoder(layers, {})])


def _encoder(layers: int, outer: dict[str, str]) -> list[tuple[str, Callable[[re.Match[str]], str]]]:
    """Rules for what UNet and ControlNet share."""

    def down(match: re.Match[str]) -> str:
        block, kind, layer, rest = int(match[1]), match[2], int(match[3]), match[4]
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.{rest.replace('conv', 'op')}"
        place = f"input_blocks.{1 + block * (layers + 1) + layer}.{int(kind == 'attentions')}"
        return f"{place}.{_resnet(rest) if kind == 'resnets' else rest}"

    def middle(match: re.Match[str]) -> str:
        kind, layer, rest = match[1], int(match[2]), match[3]
        if kind == "attentions":
            return f"middle_block.1.{rest}"
        return f"middle_block.{2 * layer}.{_resnet(rest)}"

    names = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0"}
    names |= {"time_embedding.linear_2": "time_embed.2", **outer}
    return [
        (r"down_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", down),
        (r"mid_block\.(\w+)\.(\d+)\.(.*)", middle),
        (rf"({'|'.join(map(re.escape, names))})\.(weight|bias)", lambda m: f"{names[m[1]]}.{m[2]}"),
    ]


def original_vae(folder: Path) -> State:
    levels = len(config_of(folder)["block_out_channels"])

    def level(match: re.Match[str]) -> str:
        side, block, kind, layer, rest = match[1], int(match[2]), match[3], match[4], match[5]
        up = side == "decoder"
        place = f"{side}.{'up' if up else 'down'}.{levels - 1 - block if up else block}"
        if kind != "resnets":
            return f"{place}.{'up' if up else 'down'}sample.{rest}"
        return f"{place}.block.{layer}.{rest.replace('conv_shortcut', 'nin_shortcut')}"

    def middle(match: re.Match[str]) -> str:
        side, kind, layer, rest = match[1], match[2], int(match[3]), match[4]
        if kind == "resnets":
            return f"{side}.mid.block_{layer + 1}.{rest}"
        name, _, end = rest.rpartition(".")
        return f"{side}.mid.attn_1.{_VAE_ATTENTION[name]}.{end}"

    state = _renamed(
        state_of(folder),
        [
            (r"(\w+)\.(?:up|down)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", level),
            (r"(\w+)\.mid_block\.(\w+)\.(\d+)\.(.*)", middle),
            (r"(\w+)\.conv_norm_out\.(.*)", lambda m: f"{m[1]}.norm_out.{m[2]}"),
            (r"((?:\w+\.conv_in|\w+\.conv_out|quant_conv|post_quant_conv)\..*)", lambda m: m[1]),
        ],
    )
    # The authors' attention is made of convolutions.
    return {n: t[:, :, None, None] if ".attn_1." in n and t.ndim == 2 else t for n, t in state.items()}


def _resnet(name: str) -> str:
    layer, _, end = name.rpartition(".")
    return f"{_RESNET[layer]}.{end}"


def _renamed(state: State, rules: list[tuple[str, Callable[[re.Match[str]], str]]]) -> State:
    found = {}
    for name, tensor in state.items():
        matches = [(match, rename) for pattern, rename in rules if (match := re.fullmatch(pattern, name))]
        assert len(matches) == 1, name
        match, rename = matches[0]
        found[rename(match)] = tensor.contiguous()
    return found
