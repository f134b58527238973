"""ControlNet training on the plain diffusion loss: what the reference model's canny ControlNet is made with."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, UNet2DConditionModel
from transformers import CLIPTextModel

from training.dataset import DiffusionSet
from training.loop import StageConfig, fit
from training.unet import add_noise, draw, noise_scheduler

TEXT_DROPOUT = 0.3
"""Higher than the UNet's: an empty prompt makes the ControlNet rely on the control map alone."""


def new_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet that starts as a copy of the UNet's encoder; its embedding strides twice, as the autoencoder."""
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(24, 48, 96))


def control_images(control_maps: torch.Tensor) -> torch.Tensor:
    """What a ControlNet takes, ``[B,3,H,W]`` in [0,1], of uint8 maps ``[B,H,W]``."""
    return (control_maps.float() / 255)[:, None].expand(-1, 3, -1, -1)


def train_controlnet(
    data: DiffusionSet, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, config: StageConfig, work: Path
) -> ControlNetModel:
    """Train a ControlNet for frozen ``unet`` and ``text_encoder`` on ``data.control_maps``."""
    torch.manual_seed(config.seed)
    controlnet, scheduler = new_controlnet(unet).train(), noise_scheduler()

    def loss_fn(batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        index, latents, tokens = draw(data, batch_size, TEXT_DROPOUT, generator)
        noisy, velocity, timesteps = add_noise(scheduler, latents, generator)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                prompt_embeds = text_encoder(tokens)[0]
            down, mid = controlnet(
                noisy, timesteps, prompt_embeds, control_images(data.control_maps[index]), return_dict=False
            )
            output = unet(
                noisy,
                timesteps,
                prompt_embeds,
                down_block_additional_residuals=down,
                mid_block_additional_residual=mid,
            ).sample
        return {"loss": F.mse_loss(output.float(), velocity)}

    fit("controlnet-canny", [controlnet], loss_fn, config, work)
    return controlnet.eval().requires_grad_(False)
