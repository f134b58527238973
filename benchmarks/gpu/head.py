"""The probe head at the size of Stable Diffusion 1.5, with random weights: what predictions and timings are about."""

from __future__ import annotations

import torch
from torch import Tensor

from icexport.models.probe import InnerControlProbe, ProbeConfig

TIME_WIDTH = 1280
LEVELS = ((1280, 4), (640, 2), (320, 1))
"""Channels of Stable Diffusion 1.5's attention taps, and how many times smaller than the latent they are."""
TAPS_PER_LEVEL = 3
TINY_LEVELS = ((32, 2), (16, 1))


def levels(small: bool = False) -> tuple[tuple[int, int], ...]:
    """Return (channels, downsampling) of every tap; ``small``: for a dry run on a CPU."""
    return tuple(level for level in (TINY_LEVELS if small else LEVELS) for _ in range(TAPS_PER_LEVEL))


def probe(device: str | torch.device, dtype: torch.dtype, small: bool = False) -> InnerControlProbe:
    """Return a probe with random weights."""
    dims = tuple(channels for channels, _ in levels(small))
    config = ProbeConfig(dims, projection_dim=64, num_groups=8) if small else ProbeConfig(dims)
    torch.manual_seed(0)
    return InnerControlProbe(config).to(device, dtype).eval()


def inputs(
    device: str | torch.device, dtype: torch.dtype, latent: int = 64, batch: int = 1, small: bool = False
) -> tuple[list[Tensor], Tensor]:
    """Make taps of ``batch`` pictures' conditional half with ``latent`` x ``latent`` cells, and a time embedding."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        if torch.device(device).type == "meta":
            return torch.empty(shape, device=device, dtype=dtype)
        return torch.randn(shape, generator=generator).to(device, dtype)

    taps = [draw(batch, channels, latent // scale, latent // scale) for channels, scale in levels(small)]
    return taps, draw(1, TIME_WIDTH)
