"""What probes and ControlNets are trained on: L = L_diff + alpha L_reward + beta L_align, and the probe's own loss.

Every loss that counts a part of a batch only is a mean over that part of *this* batch: the published loss averages per
micro batch and process, and so does this one.

Source: InnerControl (arXiv 2507.02321), whose reward is that of ControlNet++ (arXiv 2404.07987).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from icexport.errors import UsageError
from icexport.fidelity.normalise import control_target, normalise
from icexport.models.probe import Normaliser


@dataclass(frozen=True)
class LossConfig:
    """Which losses a ControlNet is trained on, and at which timesteps.

    Attributes:
        alpha: weight of the reward; 0 switches it off.
        reward_range: first and last timestep, both inclusive, at which the one-step estimate of the picture is judged.
        beta: weight of the alignment; 0 switches it off.
        alignment_range: first and last timestep, both inclusive, at which the probe is read.
        legacy_hed: whether to round the HED reward's map to 8 bits as the published code does: the reward then has no
            gradient.

    Raises:
        UsageError: values are out of range; all are listed.
    """

    alpha: float = 0
    reward_range: tuple[int, int] = (0, 200)
    beta: float = 0
    alignment_range: tuple[int, int] = (0, 920)
    legacy_hed: bool = False

    def __post_init__(self) -> None:
        problems = []
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if not (_is_number(value) and math.isfinite(value) and value >= 0):
                problems.append(f"{name}: got {value!r}, expected a number of 0 or more.")
        for name in ("reward_range", "alignment_range"):
            limits = getattr(self, name)
            if isinstance(limits, list):  # as TOML and JSON give it
                limits = tuple(limits)
                object.__setattr__(self, name, limits)
            whole = isinstance(limits, tuple) and [type(limit) for limit in limits] == [int, int]
            if not (whole and 0 <= limits[0] <= limits[1]):
                problems.append(f"{name}: got {limits!r}, expected two timesteps [first, last], 0 <= first <= last.")
        if self.legacy_hed not in (True, False):
            problems.append(f"legacy_hed: got {self.legacy_hed!r}, expected true or false.")
        if problems:
            raise UsageError("Invalid losses:\n  " + "\n  ".join(problems))


def in_range(timesteps: Tensor, limits: tuple[int, int]) -> Tensor:
    """Return ``[B]`` bool: whether each timestep lies in ``limits``, both ends included."""
    first, last = limits
    return (timesteps >= first) & (timesteps <= last)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the values that a mask keeps.

    Args:
        values: values of any shape; what is masked out may be NaN.
        mask: bool, of the same shape.

    Returns:
        A scalar, 0 if nothing is kept.
    """
    mask = mask.to(values.device)
    return torch.where(mask, values, 0).sum() / (mask.sum() + 1e-10)


def predict_original(
    noisy: Tensor, output: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, prediction_type: str
) -> Tensor:
    """Return the clean latents that a denoiser's output implies: the closed form of ``DDPMScheduler.step``.

    Args:
        noisy: the denoiser's input ``[B,4,h,w]``.
        output: the denoiser's output ``[B,4,h,w]``.
        timesteps: timestep of each sample, ``[B]``.
        alphas_cumprod: the scheduler's ``[T]``.
        prediction_type: ``epsilon``, ``v_prediction`` or ``sample``.

    Returns:
        ``[B,4,h,w]`` float32, not clipped.

    Raises:
        UsageError: the prediction type is unknown.
    """
    signal = alphas_cumprod.to(noisy.device)[timesteps.to(noisy.device)].float().view(-1, 1, 1, 1)
    noisy, output = noisy.float(), output.float()
    if prediction_type == "epsilon":
        return (noisy - (1 - signal).sqrt() * output) / signal.sqrt()
    if prediction_type == "v_prediction":
        return signal.sqrt() * noisy - (1 - signal).sqrt() * output
    if prediction_type == "sample":
        return output
    raise UsageError(
        f"The scheduler's prediction_type is {prediction_type!r}; expected epsilon, v_prediction or sample."
    )


def diffusion_loss(
    output: Tensor, noise: Tensor, latents: Tensor, timesteps: Tensor, scheduler: DDPMScheduler
) -> Tensor:
    """Return the mean squared error of a denoiser's output, over everything, in float32.

    Args:
        output: the denoiser's output ``[B,4,h,w]``.
        noise: noise ``[B,4,h,w]`` that was mixed in.
        latents: the clean latents ``[B,4,h,w]``.
        timesteps: timestep of each sample, ``[B]``.
        scheduler: scheduler whose ``prediction_type`` says what the output should be.

    Raises:
        UsageError: the prediction type is unknown.
    """
    kind = scheduler.config["prediction_type"]
    if kind == "epsilon":
        target = noise
    elif kind == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    elif kind == "sample":
        target = latents
    else:
        raise UsageError(f"The scheduler's prediction_type is {kind!r}; expected epsilon, v_prediction or sample.")
    return F.mse_loss(output.float(), target.float())


def reward_loss(
    z0: Tensor,
    target: Tensor,
    timesteps: Tensor,
    limits: tuple[int, int],
    decode: Callable[[Tensor], Tensor],
    extract: Callable[[Tensor], Tensor],
    skip: Tensor | None = None,
) -> Tensor:
    """Return how far the map read from the one-step estimate of the picture is from the target.

    Samples at other timesteps have no weight, so they are neither decoded nor read: the loss is the same, and most of
    its work is saved.

    Args:
        z0: estimates ``[B,4,h,w]``, from `predict_original`.
        target: target ``[B,1,H,W]``, from `training.tasks.extractors.RewardExtractor.target`.
        timesteps: timestep of each sample, ``[B]``.
        limits: first and last timestep that count, both inclusive.
        decode: takes latents ``[n,4,h,w]`` to pixels ``[n,3,H,W]`` in [0,1].
        extract: takes pixels ``[n,3,H,W]`` to maps ``[n,1,H,W]``.
        skip: bool ``[B]``: samples that do not count at any timestep, such as those with a blank target.

    Returns:
        A scalar, mean over the samples that count; 0 without a gradient if there are none.
    """
    counts = in_range(timesteps, limits).to(z0.device)
    if skip is not None:
        counts = counts & ~skip.to(z0.device)
    chosen = counts.nonzero().flatten()
    if len(chosen) == 0:
        return z0.new_zeros((), dtype=torch.float32)
    return F.mse_loss(extract(decode(z0[chosen])).float(), target[chosen].float())


def alignment_loss(
    reading: Tensor,
    control: Tensor,
    timesteps: Tensor,
    limits: tuple[int, int],
    control_range: tuple[float, float],
    normaliser: Normaliser,
) -> Tensor:
    """Return how far the probe's reading of the features is from the control map.

    Args:
        reading: the probe's output ``[B,C,h,w]``.
        control: control maps ``[B,3,H,W]`` in [0,1].
        timesteps: timestep of each sample, ``[B]``.
        limits: first and last timestep that count, both inclusive.
        control_range: the probe's values for 0 and 1.
        normaliser: the probe's normaliser. Control maps that are blank to it do not count.

    Returns:
        A scalar, mean over the samples that count; 0 if there are none.
    """
    target, blank = control_target(control, normaliser)
    found = F.interpolate(normalise(reading, control_range, normaliser), target.shape[-2:], mode="bilinear")
    errors = (found - target).square().mean((1, 2, 3))
    return masked_mean(errors, in_range(timesteps, limits).to(errors.device) & ~blank)


def balanced_mse(reading: Tensor, target: Tensor, background: float) -> Tensor:
    """Return the mean squared error in which background and drawn pixels weigh the same, for probes of sparse maps.

    Args:
        reading: the probe's output ``[B,C,h,w]``.
        target: what it should be, ``[B,C,h,w]``.
        background: value of the target's empty pixels: the lower end of the probe's ``control_range``.

    Returns:
        A scalar: (mean over the batch's background + mean over its other pixels) / 2; a part without pixels gives 0.

    Source: Readout Guidance (arXiv 2312.02150), its loss for poses and edges.
    """
    errors, empty = (reading.float() - target.float()).square(), target <= background
    return (masked_mean(errors, empty) + masked_mean(errors, ~empty)) / 2


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
