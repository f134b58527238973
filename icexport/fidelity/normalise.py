"""A probe's reading and the control map on one scale: what the fidelity monitor and the alignment loss compare.

Source: InnerControl's per-condition normalisations (arXiv 2507.02321), with an epsilon where theirs divide by 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from icexport.models.probe import Normaliser

EPS = 1e-6
"""Smallest divisor, on the scale of [0,1]: maps that are flatter count as blank and stay finite."""


def normalise(reading: Tensor, control_range: tuple[float, float], normaliser: Normaliser) -> Tensor:
    """Return a probe's output on the scale of `control_target`. Differentiable, and finite on blank maps.

    Args:
        reading: the probe's output ``[B,C,h,w]``.
        control_range: values that stand for 0 and 1.
        normaliser: ``identity``; ``max`` (depth): channel mean over the picture's maximum; ``minmax_inverted``
            (lineart): 1 minus the channel mean's min-max.

    Returns:
        ``[B,C or 1,h,w]`` float32 in [0,1].
    """
    low, high = control_range
    scaled = ((reading.float() - low) / (high - low)).clamp(0, 1)
    if normaliser == "identity":
        return scaled
    scaled = scaled.mean(1, keepdim=True)
    top = scaled.amax((2, 3), keepdim=True)
    if normaliser == "max":
        return scaled / top.clamp(min=EPS)
    bottom = scaled.amin((2, 3), keepdim=True)
    return 1 - (scaled - bottom) / (top - bottom).clamp(min=EPS)


def control_target(control: Tensor, normaliser: Normaliser) -> tuple[Tensor, Tensor]:
    """Return what a normalised reading should be for this control map, and whether there is anything to compare with.

    Args:
        control: control maps ``[B,3,H,W]`` in [0,1].
        normaliser: ``identity``: the map as it is; ``max``: channel mean over the picture's maximum;
            ``minmax_inverted``: 1 minus the channel mean, dark lines on white as the line network draws them.

    Returns:
        The target ``[B,3 or 1,H,W]`` float32 in [0,1], and ``[B]`` bool: the map is blank, so that its normalised
        form says nothing. Maps are never blank for ``identity``.
    """
    control = control.float()
    if normaliser == "identity":
        return control, torch.zeros(len(control), dtype=torch.bool, device=control.device)
    mean = control.mean(1, keepdim=True)
    top = mean.amax((2, 3), keepdim=True)
    if normaliser == "max":
        return mean / top.clamp(min=EPS), top.flatten() < EPS
    return 1 - mean, top.flatten() - mean.amin((1, 2, 3)) < EPS
