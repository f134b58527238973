"""Stable Diffusion 1.5's true architecture with random weights, which benchmarks share."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from icexport.graphs.graph import Graph
from icexport.graphs.stable_diffusion import (
    controlnet_graph,
    probe_graph,
    text_encoder_graph,
    unet_graph,
    vae_decoder_graph,
)
from icexport.models.probe import InnerControlProbe, ProbeConfig
from icexport.models.sizes import latent_multiple
from icexport.models.taps import Taps

GRAPHS = ("text_encoder", "controlnet", "unet", "probe", "vae_decoder")
VAE_CONFIG = {"block_out_channels": (128, 256, 512, 512)}


def sd15_unet() -> UNet2DConditionModel:
    """Return Stable Diffusion 1.5's UNet: 859.5 M parameters."""
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def sd15_text_encoder() -> Any:
    """Return Stable Diffusion 1.5's text encoder, that of CLIP ViT-L/14: 123.1 M parameters."""
    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12, hidden_act="quick_gelu"
    )
    return CLIPTextModel(config)


def sd15_vae() -> AutoencoderKL:
    """Return Stable Diffusion 1.5's autoencoder: 83.7 M parameters, 49.5 M of them in the decoder."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
        **VAE_CONFIG,
    )


def sd15_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """Return a ControlNet for Stable Diffusion 1.5's UNet, with weights of its own: 361.3 M parameters."""
    controlnet = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    fill_zeros(controlnet)
    return controlnet


def fill_zeros(module: nn.Module) -> None:
    """Draw parameters that are zero from N(0, 0.02): zero convolutions make an easy job of what is behind them."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)


def sd15_graph(name: str, dtype: torch.dtype) -> Graph:
    """Return one graph of the size of SD 1.5 with random weights; zero convolutions are not left at zero."""
    torch.manual_seed(0)
    if name == "text_encoder":
        return text_encoder_graph(sd15_text_encoder().to(dtype).eval(), dtype)
    if name == "vae_decoder":
        return vae_decoder_graph(sd15_vae().to(dtype).eval(), latent_multiple(sd15_unet_config()), dtype)
    with torch.device("meta") if name == "probe" else torch.device("cpu"):
        unet = sd15_unet()
    config = ProbeConfig(dims=Taps(unet).dims, condition="canny")
    if name == "unet":
        return unet_graph(unet.to(dtype).eval(), 77, config, dtype)
    if name == "probe":
        return probe_graph(InnerControlProbe(config).to(dtype).eval(), unet, dtype)
    controlnet = sd15_controlnet(unet)
    del unet
    return controlnet_graph(controlnet.to(dtype).eval(), 77, 8, dtype)


def sd15_unet_config() -> dict[str, Any]:
    """Return what ``size_multiple`` needs of the UNet's config."""
    return {"block_out_channels": (320, 640, 1280, 1280)}
