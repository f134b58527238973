"""What ``fidelity_reduce`` computes, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def fidelity_reduce(reading: Tensor, target: Tensor) -> Tensor:
    """Return the error sums of a reading against its control map, at the size of the control map.

    Args:
        reading: reading ``[b,1 or 3,h,w]`` float32; any strides; a single channel is compared with all three of the
            target.
        target: target ``[b,3,H,W]`` float32.

    Returns:
        ``[b,2]`` float32: sum of ``|e|`` and of ``e^2``, where e is the reading, bilinearly resized to H x W
        (half-pixel centres, no antialiasing), minus the target. Two runs on one device give the same bits.

    Raises:
        ValueError: if the tensors do not fit each other, when called as an operator.
        BackendUnavailableError: if Triton is missing on a GPU, when called as an operator.
    """
    errors = F.interpolate(reading, target.shape[2:], mode="bilinear", align_corners=False) - target
    return torch.stack([errors.abs().sum((1, 2, 3)), errors.square().sum((1, 2, 3))], dim=1)
