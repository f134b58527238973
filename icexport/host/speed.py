"""How fast this machine is, measured in half a second."""

from __future__ import annotations

import time

import torch
from torch import nn

_SECONDS = 0.5
_CHANNELS, _SIDE = 320, 64
"""Of the convolutions that Stable Diffusion 1 runs at 512 pixels."""


def convolution_rate() -> float:
    """Return the floating-point operations in a second of torch's float32 convolutions on the CPU."""
    convolution = nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1).requires_grad_(False)
    values = torch.zeros(1, _CHANNELS, _SIDE, _SIDE)
    convolution(values)  # the first call prepares
    operations, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < _SECONDS:
        convolution(values)
        operations += 2 * _CHANNELS**2 * 9 * _SIDE**2
    return operations / passed
