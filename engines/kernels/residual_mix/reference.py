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
    """Return ``accumulated + mix[index] * relu(group_norm(main) + shortcut)``.

    The shortcut is some channels of ``skip``, bilinearly resized to the size of ``main`` (half-pixel centres, no
    antialiasing), and then GroupNorm'ed if ``normalise_skip``.

    Args:
        accumulated: ``[B,P,H,W]`` float32, float16 or bfloat16; any strides: the sum over the taps before.
        main: ``[B,P,H,W]``, of the same dtype, like every tensor here: the last convolution's output.
        skip: ``[B,Cs,h,w]``.
        main_gamma: ``[P]``: factor of the GroupNorm of main.
        main_beta: ``[P]``: addend of the GroupNorm of main.
        skip_gamma: ``[P]``: factor of the GroupNorm of the shortcut; not read unless ``normalise_skip``.
        skip_beta: ``[P]``: addend of the GroupNorm of the shortcut; not read unless ``normalise_skip``.
        mix: ``[L]``: weights of all taps.
        index: which of the weights is this tap's.
        first_channel: the shortcut is channels ``first_channel`` to ``first_channel + P`` of skip.
        num_groups: number of groups of both GroupNorms, whose statistics are those of maps at H x W, in float32.
        eps: epsilon of both GroupNorms.
        normalise_skip: whether the shortcut has a GroupNorm.

    Returns:
        ``[B,P,H,W]``, contiguous.

    Raises:
        ValueError: as an operator, if the arguments do not fit each other.
        BackendUnavailableError: as an operator, on a GPU without Triton.
    """
    part = skip[:, first_channel : first_channel + main.shape[1]]
    shortcut = F.interpolate(part, main.shape[2:], mode="bilinear", align_corners=False)
    if normalise_skip:
        shortcut = F.group_norm(shortcut, num_groups, skip_gamma, skip_beta, eps)
    result = F.group_norm(main, num_groups, main_gamma, main_beta, eps) + shortcut
    return accumulated + mix[index] * result.relu()
