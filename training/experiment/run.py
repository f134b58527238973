"""One run of the experiment: train an arm with one seed, draw the held-out conditions, judge the pictures."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from icexport.fidelity.metrics import depth_rmse
from icexport.graphs.profile import SizeRange
from icexport.host.files import write_whole
from icexport.runtime.drawing import Request
from icexport.runtime.drawing import draw as draw_request
from icexport.runtime.eager import eager_pipeline
from icexport.runtime.schedulers import choose_scheduler
from training.experiment.recipe import Arm, ProbeKind
from training.experiment.setting import Setting
from training.loop.trainer import train
from training.tasks.controlnet import ControlNetTask
from training.tasks.leak import leak_test
from training.tasks.losses import LossConfig

logger = logging.getLogger(__name__)

RESULT = "result.json"
BATCH = 16

REAL = 2000
"""Training pictures of the image statistics."""

PROBED = 32
"""Held-out pictures that probes are read on."""

PROBED_AT = (200, 600, 920)
"""Timesteps of these readings; where the arms start, the leak test looks at more."""

READ_WITH: tuple[ProbeKind, ...] = ("attn", "held-out")
"""Probes whose errors are compared: the one that the arms train with, and one of another seed."""


def run_arm(setting: Setting, arm: Arm, seed: int) -> Path:
    """Train ``arm`` with ``seed`` and judge it; what an earlier call finished is left as it is.

    Returns:
        The run's folder: the ControlNet, ``result.json`` and some pictures.
    """
    folder = setting.work / arm.name / f"seed-{seed}"
    if (folder / RESULT).exists():
        return folder
    task = ControlNetTask(
        setting.fork(),
        setting.models,
        arm.loss,
        condition=setting.condition,
        probe=setting.probe(arm.probe) if arm.loss.beta else None,
        text_dropout=setting.recipe.text_dropout,
    )
    config = replace(setting.recipe.training, seed=seed)
    result = train(task, setting.batches(config.batch_size, seed), config, folder)
    controlnet = ControlNetModel.from_pretrained(folder / "controlnet").eval()
    judged = judge(setting, controlnet, folder)
    judged |= {"arm": arm.name, "seed": seed, "seconds": result.seconds, "losses": result.losses}
    save(judged, folder)
    return folder


def gradient_norms(setting: Setting, count: int = 8) -> dict[str, float]:
    """Measure how hard each loss pulls at the arms' first ControlNet, at weight 1: mean norm over batches."""
    parts = {
        "diffusion": LossConfig(),
        "alignment": LossConfig(beta=1.0),
        "reward": LossConfig(alpha=1.0),
    }
    controlnet, probe = setting.fork(), setting.probe("attn")
    stream = iter(setting.batches(setting.recipe.training.batch_size, seed=0))
    found: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(count):
        batch, plain = next(stream), None
        for name, loss in parts.items():
            task = ControlNetTask(controlnet, setting.models, loss, condition=setting.condition, probe=probe)
            total = task(batch, torch.Generator().manual_seed(number))["loss"]
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(task.parameters()))])
            plain = gradient if plain is None else plain
            found[name].append(float((gradient - (0 if name == "diffusion" else plain)).norm()))
    return {name: round(sum(norms) / count, 6) for name, norms in found.items()}


def real_features(setting: Setting) -> list[list[float]]:
    """Return the judge's features of training pictures, which image statistics compare with."""
    network = setting.judge()
    chunks = setting.training.pixels[:REAL].split(64)
    with torch.no_grad():
        return _rounded(torch.cat([network.features(chunk.float() / 255) for chunk in chunks]))


def _rounded(rows: Tensor) -> list[list[float]]:
    return [[round(float(v), 5) for v in row] for row in rows]


def save(result: dict[str, Any], folder: Path) -> None:
    """Write ``result.json``, which marks a run as finished."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RESULT, json.dumps(result) + "\n")


def judge(setting: Setting, controlnet: ControlNetModel | None, folder: Path) -> dict[str, Any]:
    """Score the held-out conditions, a list each, with ``controlnet`` or (None) with the control switched off."""
    data, network = setting.held_out, setting.judge()
    controls = (data.maps.float() / 255)[:, None]
    pictures = draw(setting, controlnet or setting.fork(), 1.0 if controlnet is not None else 0.0)
    with torch.no_grad():
        readings = torch.cat([network(chunk) for chunk in pictures.split(64)])
        features = torch.cat([network.features(chunk) for chunk in pictures.split(64)])
    metrics = {"judge_rmse": depth_rmse(readings, controls)}
    if setting.name != "depth":
        metrics = {"judge_rmse": 255 * (readings - controls).square().mean((1, 2, 3)).sqrt()}
    metrics["trained_metric"] = setting.condition.score(pictures, controls.expand(-1, 3, -1, -1))
    folder.mkdir(parents=True, exist_ok=True)
    _strip(controls[:12], pictures[:12]).save(folder / "pictures.png")
    found: dict[str, Any] = {name: [round(float(v), 6) for v in values] for name, values in metrics.items()}
    found["features"] = _rounded(features)
    if controlnet is not None:
        found["probes"] = {kind: probe_rows(setting, controlnet, kind) for kind in READ_WITH}
    return found


@torch.no_grad()
def draw(setting: Setting, controlnet: ControlNetModel, scale: float) -> Tensor:
    """Return a picture ``[N,3,H,W]`` in [0,1] for every held-out condition, in the arms' precision; its seed is i."""
    models, data, recipe = setting.models, setting.held_out, setting.recipe
    pipe = eager_pipeline(
        unet=models.unet,
        vae=models.vae,
        text_encoder=models.text_encoder,
        tokenizer=models.tokenizer,
        controlnet=controlnet.to(models.unet.device),
        scheduler=choose_scheduler("unipc", models.scheduler),
    )
    maps = (data.maps.float() / 255)[:, None].expand(-1, 3, -1, -1)
    request = Request(
        data.captions,
        range(len(data.captions)),
        steps=recipe.steps,
        guidance_scale=recipe.guidance_scale,
        controlnet_scale=scale,
    )
    with torch.autocast(models.unet.device.type, torch.bfloat16, enabled=recipe.training.precision == "bf16"):
        return draw_request(pipe, maps, request, calls=SizeRange(1, BATCH, BATCH)).pictures


def probe_rows(
    setting: Setting, controlnet: ControlNetModel, kind: ProbeKind, timesteps: Sequence[int] = PROBED_AT
) -> list[dict[str, float]]:
    """Return the leak test of a probe with ``controlnet``, on held-out pictures."""
    data = setting.held_out
    tokens = setting.models.tokenize(data.captions[:PROBED])
    batch = {
        "latents": data.latents[:PROBED],
        "control": (data.maps[:PROBED].float() / 255)[:, None].expand(-1, 3, -1, -1),
        "input_ids": tokens,
        "ids": data.captions[:PROBED],
    }
    rows = leak_test(
        setting.probe(kind), setting.models, controlnet, [batch], condition=setting.condition, timesteps=timesteps
    )
    return [{name: round(value, 6) for name, value in row.items()} for row in rows]


def _strip(controls: Tensor, pictures: Tensor) -> Image.Image:
    """Return control maps above their pictures, four times enlarged."""
    rows = torch.cat((torch.cat(list(controls.expand(-1, 3, -1, -1)), 2), torch.cat(list(pictures), 2)), 1)
    levels = (255 * F.interpolate(rows[None], scale_factor=2)[0].clamp(0, 1)).round().byte()
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
