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
    """Bilinear resize of some channels (half-pixel centres, no antialiasing), GroupNorm, ReLU, then a shift.

    Args:
        x: ``[B,Cx,h,w]`` float32, float16 or bfloat16; any strides.
        gamma: ``[C]``, of the same dtype as x, like every tensor here: factor of the GroupNorm.
        beta: ``[C]``: addend of the GroupNorm.
        shift: ``[1,C]`` or ``[B,C]``: added after the ReLU.
        first_channel: the op reads channels ``first_channel`` to ``first_channel + C`` of x.
        height: H of the result.
        width: W of the result.
        num_groups: number of groups of the GroupNorm, whose statistics are those of the resized map, in float32.
        eps: epsilon of the GroupNorm.

    Returns:
        ``[B,C,H,W]``, contiguous.

    Raises:
        ValueError: as an operator, if the arguments do not fit each other.
        BackendUnavailableError: as an operator, on a GPU without Triton.
    """
    part = x[:, first_channel : first_channel + len(gamma)]
    resized = F.interpolate(part, (height, width), mode="bilinear", align_corners=False)
    return F.group_norm(resized, num_groups, gamma, beta, eps).relu() + shift[:, :, None, None]
