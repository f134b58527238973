"""Line drawings: a difference of Gaussians, or the learned informative-drawings generator given its weights."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icexport.conditions.base import Condition
from icexport.conditions.weights import load_state, read_state
from icexport.errors import ConditionError
from icexport.fidelity.metrics import gaussian_filter, ssim

DARKEST_LINE = 127 / 255
"""Brightness that a line of median strength gets."""

WEAKEST_SCALE = 16 / 255
"""Lines fainter than this, in the median, are not stretched further: it would show noise."""


@dataclass(frozen=True)
class Lineart(Condition):
    """Lines, white on black. Differentiable; the scale of the difference of Gaussians counts as constant.

    A pixel is a line as far as it is darker than its surroundings, in all colours, scaled so that the median line is
    mid grey. At the default sigma this is the "standard" lineart, meant for pictures of about 512 px.

    Attributes:
        sigma: size of the surroundings, in pixels.
        threshold: faintest line that counts for the scale, in 8-bit levels.
        weights: ``.safetensors`` or ``.pth`` of the informative-drawings generator (``sk_model.pth``). The drawing is
            its inverted output, and ``sigma`` and ``threshold`` do nothing.
    """

    name: ClassVar[str] = "lineart"
    polarity: ClassVar[str] = "white lines on black"
    metric: ClassVar[str] = "SSIM"
    unit: ClassVar[str] = "ratio"
    higher_is_better: ClassVar[bool] = True

    sigma: float = 6.0
    threshold: float = 8.0
    weights: str | Path | None = None

    def __post_init__(self) -> None:
        if not (self.sigma > 0 and 0 <= self.threshold <= 255):
            raise ConditionError(
                f"Lineart has sigma {self.sigma} and threshold {self.threshold}; "
                "expected sigma > 0 pixels and 0 <= threshold <= 255 levels."
            )

    def _extract(self, pixels: Tensor) -> Tensor:
        if self.weights is not None:
            # The generator draws dark lines on white.
            drawing: Tensor = _cached_generator(Path(self.weights), pixels.device)(pixels)
            return 1 - drawing
        darker = _darker_than_surroundings(pixels, self.sigma)
        return (DARKEST_LINE * darker / _median_line(darker.detach(), self.threshold / 255)).clamp(0, 1)

    def _compare(self, readings: Tensor, control_maps: Tensor) -> Tensor:
        return ssim(readings, control_maps)


def _darker_than_surroundings(pixels: Tensor, sigma: float) -> Tensor:
    """Return how much darker than the blurred picture each pixel's least dark channel is: ``[B,1,H,W]`` in [0,1]."""
    # Reflection cannot reach past the other border, so small pictures get a shorter window.
    radius = min(round(4 * sigma), min(pixels.shape[-2:]) - 1)
    surroundings = gaussian_filter(F.pad(pixels, (radius,) * 4, mode="reflect"), sigma, radius)
    return (surroundings - pixels).amin(1, keepdim=True).clamp(min=0)


def _median_line(darker: Tensor, threshold: float) -> Tensor:
    """Return the median strength of each picture's lines above ``threshold``, or `WEAKEST_SCALE`: ``[B,1,1,1]``."""
    lines = darker.flatten(1).masked_fill(darker.flatten(1) <= threshold, torch.nan)
    # torch gives the lower of two middle values; negated, the upper. (nanquantile would be limited to 2**24 pixels.)
    median = (lines.nanmedian(1).values - (-lines).nanmedian(1).values) / 2
    return median.nan_to_num(0).clamp(min=WEAKEST_SCALE).view(-1, 1, 1, 1)


class DrawingGenerator(nn.Module):
    """The generator of informative drawings with three residual blocks; layer names are those of the public weights.

    Source: Chan, Durand and Isola, "Learning to generate line drawings that convey geometry and semantics", 2022.
    """

    def __init__(self) -> None:
        super().__init__()
        width = 64
        self.model0 = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), *_norm_relu(width))
        self.model1 = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            *_norm_relu(2 * width),
            nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1),
            *_norm_relu(4 * width),
        )
        self.model2 = nn.Sequential(*(_ResidualBlock(4 * width) for _ in range(3)))
        self.model3 = nn.Sequential(
            nn.ConvTranspose2d(4 * width, 2 * width, 3, stride=2, padding=1, output_padding=1),
            *_norm_relu(2 * width),
            nn.ConvTranspose2d(2 * width, width, 3, stride=2, padding=1, output_padding=1),
            *_norm_relu(width),
        )
        self.model4 = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(width, 1, 7), nn.Sigmoid())

    def forward(self, pixels: Tensor) -> Tensor:
        """Draw dark lines on white ``[B,1,H,W]`` of RGB ``pixels`` ``[B,3,H,W]``, in [0,1], sides at least 5 px."""
        height, width = pixels.shape[-2:]
        # Two halvings and doublings: other sizes are padded to a multiple of four and cut back.
        features = F.pad(pixels, (0, -width % 4, 0, -height % 4), mode="replicate")
        for stage in (self.model0, self.model1, self.model2, self.model3, self.model4):
            features = stage(features)
        return features[..., :height, :width]


class _ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(width, width, 3),
            *_norm_relu(width),
            nn.ReflectionPad2d(1),
            nn.Conv2d(width, width, 3),
            nn.InstanceNorm2d(width),
        )

    def forward(self, features: Tensor) -> Tensor:
        return features + self.conv_block(features)  # type: ignore[no-any-return]


def _norm_relu(width: int) -> tuple[nn.Module, nn.Module]:
    return nn.InstanceNorm2d(width), nn.ReLU()


@functools.lru_cache(maxsize=2)
def _cached_generator(path: Path, device: torch.device) -> DrawingGenerator:
    generator = DrawingGenerator()
    load_state(generator, read_state(path), path)
    return generator.to(device)
