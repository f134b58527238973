"""Canny edges: OpenCV's on the CPU, the same algorithm in torch on other devices, and a soft form for training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from icexport.conditions.base import Condition
from icexport.errors import ConditionError
from icexport.fidelity.metrics import default_tolerance_px, edge_f1, gaussian_filter
from icexport.host.pictures import round_to_8bit

MAX_MAGNITUDE = 6
"""Largest L1 norm that a 3 x 3 Sobel pair gives for pixels in [0,1]; for 8 bits 255 times as much."""

TAN_22_5 = 13573 / 2**15
"""tan(22.5 degrees) in the fixed point that OpenCV splits directions with."""


@dataclass(frozen=True)
class Canny(Condition):
    """Canny edges, exactly 0 or 1, of the pixels rounded to 8 bits; they carry no gradient.

    With ``soft``, `extract_batch` gives instead the gradient magnitude where it is a local maximum, without
    thresholds: the training target of ControlNet++, which is differentiable.

    Attributes:
        low_threshold: weakest gradient that continues an edge, in 8-bit grey levels of its L1 norm, 0 to 1530.
        high_threshold: weakest gradient that starts one. Equal thresholds switch hysteresis off.
        soft: give the magnitude, divided by its largest possible value. `extract` and `score` give edges all the same.
        blur_sigma: for ``soft``: Gaussian blur before the gradient, in pixels; 0 is none.
        tolerance_px: for `score`: how far an edge may be off, in pixels. None is 1 px per 64 px of the shorter side.
    """

    name: ClassVar[str] = "canny"
    polarity: ClassVar[str] = "white edges on black"
    metric: ClassVar[str] = "edge F1"
    unit: ClassVar[str] = "ratio"
    higher_is_better: ClassVar[bool] = True

    low_threshold: float = 60
    high_threshold: float = 140
    soft: bool = False
    blur_sigma: float = 0
    tolerance_px: int | None = None

    def __post_init__(self) -> None:
        limit = 255 * MAX_MAGNITUDE
        if not 0 <= self.low_threshold <= self.high_threshold <= limit:
            raise ConditionError(
                f"Canny thresholds are {self.low_threshold} and {self.high_threshold}; "
                f"expected 0 <= low_threshold <= high_threshold <= {limit}."
            )
        if self.blur_sigma < 0:
            raise ConditionError(f"blur_sigma is {self.blur_sigma}; expected 0 or more pixels.")

    def _extract(self, pixels: Tensor) -> Tensor:
        if self.soft:
            return thinned_magnitude(_blur(pixels, self.blur_sigma)) / MAX_MAGNITUDE
        pixels = round_to_8bit(pixels.detach())
        if pixels.device.type == "cpu":
            return self._extract_8bit(pixels)  # the same edges, some 25 times faster
        return canny_edges(pixels, self.low_threshold, self.high_threshold)

    def _extract_8bit(self, pixels: Tensor) -> Tensor:
        # One by one on the CPU, whatever the device: a score has to be what cv2.Canny gives, by construction.
        levels = (255 * pixels).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()
        edges = np.stack([cv2.Canny(picture, self.low_threshold, self.high_threshold) for picture in levels])
        return torch.from_numpy(edges)[:, None].to(pixels.device) / 255

    def _compare(self, readings: Tensor, control_maps: Tensor) -> Tensor:
        tolerance = self.tolerance_px
        if tolerance is None:
            tolerance = default_tolerance_px(*readings.shape[-2:])
        return edge_f1(readings, control_maps, tolerance)


def canny_edges(pixels: Tensor, low_threshold: float, high_threshold: float) -> Tensor:
    """Return the edges that ``cv2.Canny`` finds in 8-bit pictures, pixel for pixel, in torch on any device.

    Args:
        pixels: ``[B,3,H,W]``, multiples of 1/255 in [0,1].
        low_threshold: as in `Canny`.
        high_threshold: as in `Canny`.

    Returns:
        ``[B,1,H,W]`` float32, 0 or 1.
    """
    magnitude = thinned_magnitude((255 * pixels).round())  # whole grey levels, so every sum is exact
    return _hysteresis(magnitude > low_threshold, magnitude > high_threshold).float()


def thinned_magnitude(pixels: Tensor) -> Tensor:
    """Return the L1 norm of the Sobel gradient where it is a maximum across the edge, 0 elsewhere. Differentiable.

    Args:
        pixels: pictures ``[B,C,H,W]``; at each pixel the channel with the strongest gradient counts.

    Returns:
        ``[B,1,H,W]``, in [0, `MAX_MAGNITUDE`] times the largest pixel value.

    Source: Canny, "A computational approach to edge detection", 1986, with OpenCV's borders and tie rules.
    """
    dx, dy = _sobel(pixels)
    strongest = (dx.abs() + dy.abs()).argmax(1, keepdim=True)
    dx, dy = dx.gather(1, strongest), dy.gather(1, strongest)
    magnitude = dx.abs() + dy.abs()
    return magnitude * _is_maximum(magnitude.detach(), dx.detach(), dy.detach())


def _sobel(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return horizontal and vertical 3 x 3 Sobel gradients with replicated borders, both in ``pixels``' shape."""
    padded = F.pad(pixels, (1, 1, 1, 1), mode="replicate")
    rows = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    columns = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    return rows[..., 2:] - rows[..., :-2], columns[..., 2:, :] - columns[..., :-2, :]


def _is_maximum(magnitude: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Return where the magnitude is above both neighbours along the gradient, rounded to one of four directions."""
    padded = F.pad(magnitude, (1, 1, 1, 1))
    height, width = magnitude.shape[-2:]

    def neighbour(down: int, right: int) -> Tensor:
        return padded[..., 1 + down : 1 + down + height, 1 + right : 1 + right + width]

    x, y = dx.abs(), dy.abs()
    across = y < TAN_22_5 * x
    along = y - 2 * x > TAN_22_5 * x  # tan(67.5 degrees) is tan(22.5 degrees) + 2
    horizontal = (magnitude > neighbour(0, -1)) & (magnitude >= neighbour(0, 1))
    vertical = (magnitude > neighbour(-1, 0)) & (magnitude >= neighbour(1, 0))
    falling = (magnitude > neighbour(-1, -1)) & (magnitude > neighbour(1, 1))
    rising = (magnitude > neighbour(-1, 1)) & (magnitude > neighbour(1, -1))
    diagonal = torch.where((dx < 0) == (dy < 0), falling, rising)
    return torch.where(across, horizontal, torch.where(along, vertical, diagonal))


def _hysteresis(weak: Tensor, strong: Tensor) -> Tensor:
    """Return weak pixels that touch strong ones, directly or through other weak ones (8-connected)."""
    while True:
        grown = weak & (F.max_pool2d(strong.float(), 3, stride=1, padding=1) > 0)
        if torch.equal(grown, strong):
            return grown
        strong = grown


def _blur(pixels: Tensor, sigma: float) -> Tensor:
    if sigma == 0:
        return pixels
    radius = max(1, round(2 * sigma))
    return gaussian_filter(F.pad(pixels, (radius,) * 4, mode="replicate"), sigma, radius)
