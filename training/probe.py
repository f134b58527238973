"""Probe training: the small network that reads the control map back from the UNet's features.

The recipe follows Readout Guidance's spatial heads with four changes: a timestep for every sample instead of one a
batch, the embedding of the true timestep, range (-1, 1), and half of the batches with the ControlNet attached, since
that is how the probe is used (arXiv 2507.02321; google-research/readout_guidance, readout_training/train_spatial.py).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, UNet2DConditionModel
from transformers import CLIPTextModel

from icexport.models.probe import InnerControlProbe, ProbeConfig
from icexport.models.taps import Taps
from training.controlnet import control_images
from training.dataset import DiffusionSet
from training.loop import StageConfig, fit
from training.unet import add_noise, draw, noise_scheduler

TEXT_DROPOUT = 0.3


def new_probe(unet: UNet2DConditionModel) -> InnerControlProbe:
    """An untrained probe of the official architecture, scaled to the reference UNet's taps."""
    return InnerControlProbe(
        ProbeConfig(
            dims=Taps(unet, "attn").dims,
            projection_dim=64,
            num_groups=8,
            head_dims=(24, 8),
            time_embed_dim=unet.time_embedding.linear_2.out_features,
            tap_kind="attn",
            output_scale=2,
            condition="canny",
            normaliser="identity",
        )
    )


def train_probe(
    data: DiffusionSet,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    controlnet: ControlNetModel,
    config: StageConfig,
    work: Path,
) -> InnerControlProbe:
    """Train a canny probe on frozen models; mean squared error to the control map at the probe's resolution."""
    torch.manual_seed(config.seed)
    probe, scheduler, taps = new_probe(unet).train(), noise_scheduler(), Taps(unet, "attn")

    def loss_fn(batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        index, latents, tokens = draw(data, batch_size, TEXT_DROPOUT, generator)
        noisy, _, timesteps = add_noise(scheduler, latents, generator)
        images = control_images(data.control_maps[index])
        residuals = {}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), taps.record() as features:
            prompt_embeds = text_encoder(tokens)[0]
            if torch.rand((), generator=generator) < 0.5:
                down, mid = controlnet(noisy, timesteps, prompt_embeds, images, return_dict=False)
                residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
            unet(noisy, timesteps, prompt_embeds, **residuals)
        embedding = unet.time_embedding(unet.time_proj(timesteps))
        reading = probe([f.float() for f in features], embedding)
        target = F.adaptive_avg_pool2d(images, reading.shape[-2:]) * 2 - 1
        return {"loss": F.mse_loss(reading, target)}

    fit("probe-canny", [probe], loss_fn, config, work)
    return probe.eval().requires_grad_(False)
