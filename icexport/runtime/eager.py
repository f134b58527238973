"""Diffusers' own pipeline on PyTorch models: what engines are compared with, and what draws while a model trains."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionControlNetPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from icexport.models.loading import ModelSource


def eager_pipeline(
    *, unet: Any, vae: Any, text_encoder: Any, tokenizer: Any, controlnet: Any, scheduler: SchedulerMixin
) -> StableDiffusionControlNetPipeline:
    """Return a pipeline of these models as they are, without a safety checker and without a progress bar."""
    pipe = StableDiffusionControlNetPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        controlnet=controlnet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_eager(
    source: ModelSource, dtype: torch.dtype, scheduler: SchedulerMixin, device: str | torch.device = "cpu"
) -> StableDiffusionControlNetPipeline:
    """Return the pipeline of a model's files.

    Raises:
        CheckpointError: weights are missing or damaged.
    """
    pipe = eager_pipeline(
        unet=source.unet(dtype),
        vae=source.vae(dtype),
        text_encoder=source.text_encoder(dtype),
        tokenizer=source.tokenizer(),
        controlnet=source.controlnet_model(dtype),
        scheduler=scheduler,
    )
    return pipe.to(device)
