"""What ``resize_group_norm_relu`` computes, in plain torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def resize_group_norm_relu(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    shift: Tensor,
    first_channel: int,
    height: int,
    width: int,
    num_groups: int,
    eps: float,
) -> Tensor:
    """Resized, normalised, rectified and shifted channels; see ``op.resize_group_norm_relu``."""
    part = x[:, first_channel : first_channel + len(gamma)]
    resized = F.interpolate(part, (height, width), mode="bilinear", align_corners=False)
    return F.group_norm(resized, num_groups, gamma, beta, eps).relu() + shift[:, :, None, None]
