"""The leak test: does a probe read the picture, or the control that the ControlNet has added to the features?

Decoder features hold the ControlNet's residuals, so that a probe can read the control map back without the picture
obeying it. Latents of one picture get the control map of another: the reading of a probe that looks at the picture is
close to the picture's own map, that of one that looks at the residuals is close to the other's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor

from icexport.conditions import Condition
from icexport.errors import UsageError
from icexport.models.probe import InnerControlProbe
from icexport.models.taps import Taps
from training.tasks.frozen import BaseModels, Noised, control_maps, probe_target, read, residuals

TIMESTEPS = (0, 200, 400, 600, 800, 920, 999)


@torch.no_grad()
def leak_test(
    probe: InnerControlProbe,
    models: BaseModels,
    controlnet: ControlNetModel | None,
    batches: Sequence[dict[str, Any]],
    *,
    condition: Condition,
    timesteps: Sequence[int] = TIMESTEPS,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Return the probe's mean squared error, on the maps' scale [0,1], with the right and with a foreign control.

    The prompt is empty, so that only latents and control differ.

    Args:
        probe: reads the UNet's taps.
        models: the base model, on the probe's device.
        controlnet: takes the control maps; None: only the plain UNet is read.
        batches: batches as training takes them, each of at least two different pictures; the control maps are
            exchanged within each.
        condition: extracts the control maps that the batches lack.
        timesteps: noise levels to look at.
        seed: seed of the noise.

    Returns:
        A row for each timestep: ``timestep``; ``plain``, the error without ControlNet; and with a ControlNet
        ``matched`` (own control map), ``to_picture`` and ``to_control`` (foreign control map: the error to the
        picture's own and to the foreign one), and ``chance``, how far the two maps are from each other.

    Raises:
        UsageError: a batch has fewer than two pictures.
    """
    if few := [len(batch["input_ids"]) for batch in batches if len(batch["input_ids"]) < 2]:
        raise UsageError(f"The leak test exchanges control maps within a batch: it needs two pictures, got {few}.")
    generator = torch.Generator().manual_seed(seed)
    cases = [_case(batch, models, condition, generator) for batch in batches]
    taps, rows = Taps(models.unet, probe.config.tap_kind), []
    for timestep in timesteps:
        errors = [_errors(probe, models, taps, controlnet, _at(case, models, timestep)) for case in cases]
        means = {name: float(torch.cat([error[name] for error in errors]).mean()) for name in errors[0]}
        rows.append({"timestep": timestep, **means})
    return rows


def _case(batch: dict[str, Any], models: BaseModels, condition: Condition, generator: torch.Generator) -> Noised:
    """Return a batch with its noise, not yet added."""
    device, count = models.unet.device, len(batch["input_ids"])
    latents = batch["latents"].to(device) if "latents" in batch else models.encode(batch["pixels"].to(device), None)
    return Noised(
        latents=latents,
        noise=torch.randn(latents.shape, generator=generator).to(device),
        noisy=latents,
        timesteps=torch.zeros(count, dtype=torch.int64, device=device),
        host_timesteps=torch.zeros(count, dtype=torch.int64),
        text=models.embed(models.empty_ids[None].to(device)).expand(count, -1, -1),
        control=control_maps(batch, condition, device),
        pixels=None,
    )


def _at(case: Noised, models: BaseModels, timestep: int) -> Noised:
    host = torch.full_like(case.host_timesteps, timestep)
    timesteps = host.to(case.timesteps.device)
    noisy = models.scheduler.add_noise(case.latents, case.noise, timesteps)
    return replace(case, noisy=noisy, timesteps=timesteps, host_timesteps=host)


def _errors(
    probe: InnerControlProbe, models: BaseModels, taps: Taps, controlnet: ControlNetModel | None, sample: Noised
) -> dict[str, Tensor]:
    """Return the errors ``[B]`` by name, as ``leak_test`` describes them."""
    low, high = probe.config.control_range

    def reading(**added: Any) -> Tensor:
        with taps.record() as found:
            models.unet(sample.noisy, sample.timesteps, sample.text, return_dict=False, **added)
        return read(probe, models, found, sample.timesteps)

    def error(x: Tensor, y: Tensor) -> Tensor:
        return ((x - y) / (high - low)).square().mean((1, 2, 3))

    plain = reading()
    own = probe_target(probe, sample.control, plain.shape[-2:])
    errors = {"plain": error(plain, own)}
    if controlnet is not None:
        matched = reading(**residuals(controlnet, sample, sample.control))
        swapped = reading(**residuals(controlnet, sample, sample.control.roll(1, 0)))
        foreign = own.roll(1, 0)
        errors |= {
            "matched": error(matched, own),
            "to_picture": error(swapped, own),
            "to_control": error(swapped, foreign),
            "chance": error(own, foreign),
        }
    return errors
