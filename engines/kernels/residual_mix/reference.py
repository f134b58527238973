"""What ``residual_mix`` computes, in plain torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def residual_mix(
    accumulated: Tensor,
    main: Tensor,
    skip: Tensor,
    main_gamma: Tensor,
    main_beta: Tensor,
    skip_gamma: Tensor,
    skip_beta: Tensor,
    mix: Tensor,
    index: int,
    first_channel: int,
    num_groups: int,
    eps: float,
    normalise_skip: bool,
) -> Tensor:
    """The sum over taps with one more tap; see ``op.residual_mix``."""
    part = skip[:, first_channel : first_channel + main.shape[1]]
    shortcut = F.interpolate(part, main.shape[2:], mode="bilinear", align_corners=False)
    if normalise_skip:
        shortcut = F.group_norm(shortcut, num_groups, skip_gamma, skip_beta, eps)
    result = F.group_norm(main, num_groups, main_gamma, main_beta, eps) + shortcut
    return accumulated + mix[index] * result.relu()
