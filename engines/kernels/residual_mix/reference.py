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
        accumulated: sum over the taps before, ``[B,P,H,W]`` float32, float16 or bfloat16; any strides.
        main: the last convolution's output ``[B,P,H,W]``, of the same dtype, like every tensor here.
        skip: map ``[B,Cs,h,w]`` that holds the shortcut.
        main_gamma: factor of the GroupNorm of main, ``[P]``.
        main_beta: addend of the GroupNorm of main, ``[P]``.
        skip_gamma: factor of the GroupNorm of the shortcut, ``[P]``; not read unless ``normalise_skip``.
        skip_beta: addend of the GroupNorm of the shortcut, ``[P]``; not read unless ``normalise_skip``.
        mix: weights of all taps, ``[L]``.
        index: which of the weights is this tap's.
        first_channel: first channel of the shortcut, which is ``first_channel`` to ``first_channel + P`` of skip.
        num_groups: number of groups of both GroupNorms, whose statistics are those of maps at H x W, in float32.
        eps: epsilon of both GroupNorms.
        normalise_skip: whether the shortcut has a GroupNorm.

    Returns:
        ``[B,P,H,W]``, contiguous.

    Raises:
        ValueError: if the arguments do not fit each other, when called as an operator.
        BackendUnavailableError: if Triton is missing on a GPU, when called as an operator.
    """
    part = skip[:, first_channel : first_channel + main.shape[1]]
    shortcut = F.interpolate(part, main.shape[2:], mode="bilinear", align_corners=False)
    if normalise_skip:
        shortcut = F.group_norm(shortcut, num_groups, skip_gamma, skip_beta, eps)
    result = F.group_norm(main, num_groups, main_gamma, main_beta, eps) + shortcut
    return accumulated + mix[index] * result.relu()
