"""Diffusers' own pipeline on PyTorch models: what engines are compared with, and what draws while a model trains."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionControlNetPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from icexport.models.source import ModelSource
from icexport.runtime.schedulers import load_scheduler


def eager_pipeline(
    *,
    unet: Any,
    vae: Any,
    text_encoder: Any,
    tokenizer: Any,
    controlnet: Any,
    scheduler: SchedulerMixin,
    kind: type[StableDiffusionControlNetPipeline] = StableDiffusionControlNetPipeline,
) -> StableDiffusionControlNetPipeline:
    """Return a pipeline of these models as they are, without a safety checker and without a progress bar."""
    pipe = kind(
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
    source: ModelSource,
    dtype: torch.dtype,
    scheduler: SchedulerMixin | None = None,
    device: str | torch.device = "cpu",
) -> StableDiffusionControlNetPipeline:
    """Return the pipeline of a model's files as diffusers itself loads them, as far as it can.

    Args:
        source: the model.
        dtype: dtype of the weights.
        scheduler: scheduler in place of the model's own.
        device: where it runs.

    Raises:
        CheckpointError: weights are missing or damaged.
    """
    base = source.base
    load = {"unet": source.unet, "vae": source.vae, "text_encoder": source.text_encoder}
    # What diffusers does not find by itself: files of other names, and an autoencoder of another model.
    given = {n: load[n](dtype) for n, part in base.parts.items() if part.folder != base.path / n}
    given["controlnet"] = source.controlnet_model(dtype)
    if scheduler is not None:
        given["scheduler"] = scheduler
    if not base.index or given.keys() >= load.keys():
        own = load_scheduler(base.folders["scheduler"], source.config("scheduler")["_class_name"])
        models = {n: load[n](dtype) for n in load.keys() - given.keys()}
        return eager_pipeline(tokenizer=source.tokenizer(), **{"scheduler": own, **models, **given}).to(device)
    variants = {part.weights.variant for part in base.parts.values()} - {None}
    pipe = StableDiffusionControlNetPipeline.from_pretrained(
        base.path,
        **given,
        torch_dtype=dtype,
        variant=source.names.variant or next(iter(variants), None),
        local_files_only=True,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
