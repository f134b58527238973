"""Control fidelity: how close what a picture shows is to its control map. Pure functions, one number a picture.

All take batches on any device and return ``[B]`` float32 there. Shape letters: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from icexport.errors import UsageError

EPS = 1e-6
"""Below this range a map counts as flat: it normalises to zeros, not to NaN."""

SSIM_SIGMA, SSIM_RADIUS = 1.5, 5


def default_tolerance_px(height: int, width: int) -> int:
    """Return how far an edge may be off, in pixels: 1 px for each 64 px of the shorter side, at least 1."""
    return max(1, round(min(height, width) / 64))


def edge_f1(predicted: Tensor, target: Tensor, tolerance_px: int) -> Tensor:
    """Return F1 of edge pixels that have an edge pixel of the other map nearby.

    Args:
        predicted: edges found in the pictures, ``[B,1|3,H,W]``: bool, or float with edges above 0.5 in any channel.
        target: edges asked for, same batch, height and width.
        tolerance_px: largest distance that counts as the same place, in pixels, along either axis. 0 is exact.

    Returns:
        ``[B]`` in [0,1], higher is better. Two blank maps score 1, one blank map 0.

    Raises:
        UsageError: if the shapes do not match or the tolerance is negative.
    """
    if tolerance_px < 0:
        raise UsageError(f"tolerance_px is {tolerance_px}; expected 0 or more pixels.")
    predicted, target = _edges(predicted), _edges(target)
    _require_same_shape(predicted, target)
    counts = predicted.sum((1, 2, 3)), target.sum((1, 2, 3))
    precision = (predicted * _dilate(target, tolerance_px)).sum((1, 2, 3)) / counts[0].clamp(min=1)
    recall = (target * _dilate(predicted, tolerance_px)).sum((1, 2, 3)) / counts[1].clamp(min=1)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=EPS)
    return torch.where((counts[0] == 0) & (counts[1] == 0), torch.ones_like(f1), f1)


def ssim(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the structural similarity with an 11 x 11 Gaussian window (sigma 1.5 px), mean over channels and pixels.

    Args:
        predicted: ``[B,C,H,W]`` in [0,1], H and W at least 11.
        target: same shape and range.

    Returns:
        ``[B]`` in [-1,1], higher is better, 1 for equal maps.

    Raises:
        UsageError: if the shapes differ or a side is below 11 px.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004, equation 13.
    """
    _require_same_shape(predicted, target)
    window = 2 * SSIM_RADIUS + 1
    if min(predicted.shape[-2:]) < window:
        raise UsageError(f"SSIM needs maps of at least {window} x {window} px, got {tuple(predicted.shape[-2:])}.")
    # float64, because E[x^2] - E[x]^2 cancels: in TF32, which GPUs may convolve in, its error is as large as c2.
    x, y = predicted.double(), target.double()
    mean_x, mean_y, xx, yy, xy = (gaussian_filter(m, SSIM_SIGMA, SSIM_RADIUS) for m in (x, y, x * x, y * y, x * y))
    variances = (xx - mean_x.square()) + (yy - mean_y.square())
    covariance = xy - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return (luminance * (2 * covariance + c2) / (variances + c2)).mean((1, 2, 3)).float()


def depth_rmse(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the root mean square error of two depth maps, each stretched to 0-255 by its own minimum and maximum.

    Both sides are normalised alike, unlike the published protocol, which divides the prediction by its maximum only.

    Args:
        predicted: ``[B,C,H,W]``, any scale and offset.
        target: same shape.

    Returns:
        ``[B]`` in [0,255] grey levels, lower is better.

    Raises:
        UsageError: if the shapes differ.
    """
    _require_same_shape(predicted, target)
    error = 255 * (min_max(predicted.float()) - min_max(target.float()))
    return error.square().mean((1, 2, 3)).sqrt()


def psnr(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio.

    Args:
        predicted: ``[B,C,H,W]`` in [0,1].
        target: same shape and range.

    Returns:
        ``[B]`` in dB, higher is better, ``inf`` for equal maps.

    Raises:
        UsageError: if the shapes differ.
    """
    _require_same_shape(predicted, target)
    return -10 * (predicted.float() - target.float()).square().mean((1, 2, 3)).log10()


def min_max(maps: Tensor) -> Tensor:
    """Stretch each map of ``[B,C,H,W]`` to [0,1] by its own minimum and maximum; a flat one becomes zeros."""
    low, high = maps.amin((1, 2, 3), keepdim=True), maps.amax((1, 2, 3), keepdim=True)
    return (maps - low) / (high - low).clamp(min=EPS)


def gaussian_filter(maps: Tensor, sigma: float, radius: int) -> Tensor:
    """Blur ``[B,C,H,W]`` with a Gaussian of ``sigma`` px cut at ``radius`` px. Unpadded: ``[B,C,H-2r,W-2r]``."""
    offsets = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device)
    weights = torch.exp(-offsets.square() / (2 * sigma**2))
    channels = maps.shape[1]
    kernel = (weights / weights.sum()).expand(channels, 1, 1, -1)
    return F.conv2d(F.conv2d(maps, kernel, groups=channels), kernel.mT, groups=channels)


def _edges(maps: Tensor) -> Tensor:
    """Return edge maps as ``[B,1,H,W]`` float 0 or 1."""
    if maps.ndim != 4:
        raise UsageError(f"Edge maps have shape {tuple(maps.shape)}; expected [B,1,H,W] or [B,3,H,W].")
    is_edge = maps if maps.dtype == torch.bool else maps > 0.5
    return is_edge.any(1, keepdim=True).float()


def _dilate(edges: Tensor, radius: int) -> Tensor:
    return F.max_pool2d(edges, 2 * radius + 1, stride=1, padding=radius)


def _require_same_shape(predicted: Tensor, target: Tensor) -> None:
    if predicted.ndim != 4 or predicted.shape != target.shape:
        raise UsageError(
            f"Cannot compare maps of shape {tuple(predicted.shape)} with {tuple(target.shape)}; "
            "expected two equal shapes [B,C,H,W]. Resize one to the other's size first."
        )
