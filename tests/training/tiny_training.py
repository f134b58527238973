"""Small networks and pictures that the tests of the training tasks share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, DDPMScheduler

from icexport import conditions
from icexport.models.probe import InnerControlProbe
from training.tasks.frozen import BaseModels, load_base

CANNY = conditions.get("canny")


def networks(folder: Path, prediction_type: str = "epsilon") -> tuple[BaseModels, ControlNetModel, InnerControlProbe]:
    """What `tests.tiny_models.save_tiny_model` wrote."""
    models = load_base(str(folder))
    models.scheduler = DDPMScheduler.from_config(models.scheduler.config, prediction_type=prediction_type)
    controlnet = ControlNetModel.from_pretrained(folder / "controlnet-canny")
    return models, controlnet, InnerControlProbe.from_pretrained(folder / "probe-canny").eval()


def pictures(models: BaseModels, count: int = 4) -> dict[str, Any]:
    """A batch of bright squares on noise, 16 px."""
    generator = torch.Generator().manual_seed(7)
    pixels = 0.2 * torch.rand((count, 3, 16, 16), generator=generator)
    for index in range(count):
        pixels[index, :, 3 + index : 10 + index, 4:11] += 0.7
    names = [f"square {index}" for index in range(count)]
    return {"pixels": pixels, "input_ids": models.tokenize(names), "ids": names}


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of the CPU."""
    return torch.Generator().manual_seed(seed)
