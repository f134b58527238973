"""How well the reference model does on pictures that it was never trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from torch import Tensor

from icexport import conditions
from icexport.conditions import Condition
from icexport.models.probe import InnerControlProbe
from training.data import icons
from training.data.scenes import HELD_OUT, render_many
from training.reference.autoencoder import reconstruction_psnr
from training.tasks.frozen import BaseModels, load_base
from training.tasks.leak import leak_test

MAPS = 96
"""Held-out pictures of each condition."""

LEAK_PICTURES = 64

STEPS = 20
GUIDANCE = 3.0
BATCH = 16
SHOWN = 12

DRAWN = 0.02
"""A map with less in it cannot be followed or missed."""


@dataclass(frozen=True)
class HeldOut:
    """What one condition is judged on.

    Attributes:
        pixels: pictures, uint8 ``[N,3,64,64]``.
        maps: control maps ``[N,3,64,64]`` in [0,1].
        prompts: one prompt for each picture.
    """

    pixels: Tensor
    maps: Tensor
    prompts: list[str]


def held_out(condition: Condition, work: Path) -> HeldOut:
    """Return icons, or scenes for depth; the first `MAPS` of a fixed order whose maps are not nearly blank."""
    if condition.name == "depth":
        scenes = render_many(range(HELD_OUT, HELD_OUT + MAPS))
        maps = torch.from_numpy(scenes.depth).float()[:, None].expand(-1, 3, -1, -1) / 255
        return HeldOut(torch.from_numpy(scenes.images).permute(0, 3, 1, 2), maps, scenes.captions)
    found = icons.prepare(work / "data")
    found = found.subset(found.held_out)
    pixels = torch.from_numpy(found.images).permute(0, 3, 1, 2)
    maps = torch.cat([condition.extract_batch(chunk.float() / 255) for chunk in pixels.split(64)])
    drawn = maps.mean((1, 2, 3)) > DRAWN
    order = torch.nonzero(drawn)[:, 0][torch.randperm(int(drawn.sum()), generator=torch.Generator().manual_seed(0))]
    index = order[:MAPS]
    return HeldOut(pixels[index], maps[index], [prompt_of(found, int(i)) for i in index])


def prompt_of(pictures: icons.IconSet, index: int) -> str:
    """Return the full caption of one icon: name, colours, style."""
    name, style, colors = (str(getattr(pictures, f)[index]) for f in ("names", "styles", "colors"))
    words = [c for c in colors.split(",") if c and c not in name.split()]
    return f"{name}, {' and '.join(words)}, {style} icon" if words else f"{name}, {style} icon"


@torch.no_grad()
def generate(pipe: StableDiffusionControlNetPipeline, prompts: list[str], maps: Tensor, scale: float) -> Tensor:
    """Return pictures ``[N,3,H,W]`` in [0,1]; picture i is drawn with seed i."""
    found = []
    for start in range(0, len(prompts), BATCH):
        stop = min(start + BATCH, len(prompts))
        images = pipe(
            prompts[start:stop],
            image=maps[start:stop],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            controlnet_conditioning_scale=scale,
            generator=[torch.Generator().manual_seed(i) for i in range(start, stop)],
            output_type="pt",
        ).images
        found.append(images)
    return torch.cat(found)


@torch.no_grad()
def measure_condition(model: Path, work: Path, condition: Condition) -> tuple[dict[str, Any], list[Tensor], list[str]]:
    """Return everything that the model card says of one condition, and the rows and titles of its contact sheet."""
    data = held_out(condition, work)
    controlnet = ControlNetModel.from_pretrained(model / f"controlnet-{condition.name}")
    pipe = StableDiffusionControlNetPipeline.from_pretrained(model, controlnet=controlnet, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    controlled, free = generate(pipe, data.prompts, data.maps, 1.0), generate(pipe, data.prompts, data.maps, 0.0)
    models = load_base(str(model))
    latents = models.encode(data.pixels.float() / 255, None)
    scores = {
        "control": condition.score(controlled, data.maps),
        "scale 0": condition.score(free, data.maps),
        "other maps": condition.score(controlled, data.maps.roll(1, 0)),
        "autoencoder": condition.score(models.decode(latents), data.maps),
    }
    result = {
        "metric": condition.metric,
        "unit": condition.unit,
        "higher_is_better": condition.higher_is_better,
        "maps": len(data.prompts),
        "score": {name: round(float(s.mean()), 4) for name, s in scores.items()},
        "reconstruction_psnr_db": round(float(reconstruction_psnr(models.vae, data.pixels).mean()), 2),
        "probe": _leak(model, models, controlnet, condition, data, latents),
    }
    rows = [data.pixels.float() / 255, data.maps, controlled, free]
    return result, [row[:SHOWN] for row in rows], data.prompts[:SHOWN]


def _leak(
    model: Path,
    models: BaseModels,
    controlnet: ControlNetModel,
    condition: Condition,
    data: HeldOut,
    latents: Tensor,
) -> list[dict[str, float]]:
    probe = InnerControlProbe.from_pretrained(model / f"probe-{condition.name}").eval()
    first = slice(0, LEAK_PICTURES)
    batch = {
        "latents": latents[first],
        "control": data.maps[first],
        "input_ids": models.tokenize(data.prompts[first]),
        "ids": data.prompts[first],
    }
    rows = leak_test(probe, models, controlnet, [batch], condition=condition)
    return [{name: round(value, 5) for name, value in row.items()} for row in rows]


def judging_condition(name: str, hed_weights: Path | None) -> Condition:
    """Return the condition that judges the reference model."""
    return conditions.of_model(name, "reference", **({"weights": hed_weights} if name == "hed" else {}))
