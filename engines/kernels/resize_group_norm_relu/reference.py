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
    """Resize some channels bilinearly (half-pixel centres, no antialiasing), then GroupNorm, ReLU and a shift.

    Args:
        x: input ``[B,Cx,h,w]`` float32, float16 or bfloat16; any strides.
        gamma: factor of the GroupNorm, ``[C]``, of the same dtype as x, like every tensor here.
        beta: addend of the GroupNorm, ``[C]``.
        shift: addend after the ReLU, ``[1,C]`` or ``[B,C]``.
        first_channel: first of the channels that are read, ``first_channel`` to ``first_channel + C`` of x.
        height: height H of the result.
        width: width W of the result.
        num_groups: number of groups of the GroupNorm, whose statistics are those of the resized map, in float32.
        eps: epsilon of the GroupNorm.

    Returns:
        ``[B,C,H,W]``, contiguous.

    Raises:
        ValueError: if the arguments do not fit each other, when called as an operator.
        BackendUnavailableError: if Triton is missing on a GPU, when called as an operator.
    """
    part = x[:, first_channel : first_channel + len(gamma)]
    resized = F.interpolate(part, (height, width), mode="bilinear", align_corners=False)
    return F.group_norm(resized, num_groups, gamma, beta, eps).relu() + shift[:, :, None, None]
