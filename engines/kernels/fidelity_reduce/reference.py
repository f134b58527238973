"""What ``fidelity_reduce`` computes, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def fidelity_reduce(reading: Tensor, target: Tensor) -> Tensor:
    """Sums of absolute and of squared errors; see ``op.fidelity_reduce``."""
    errors = F.interpolate(reading, target.shape[2:], mode="bilinear", align_corners=False) - target
    return torch.stack([errors.abs().sum((1, 2, 3)), errors.square().sum((1, 2, 3))], dim=1)
