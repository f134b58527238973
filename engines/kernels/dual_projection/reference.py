"""What ``dual_projection`` computes, in plain torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def dual_projection(x: Tensor, weight: Tensor) -> Tensor:
    """Apply a 1x1 convolution without bias.

    Args:
        x: input ``[B,C,h,w]`` float32, float16 or bfloat16; any strides.
        weight: weights ``[O,C]``, of the same dtype; for the probe the rows of its first convolution, then of its
            shortcut.

    Returns:
        ``[B,O,h,w]``, contiguous, accumulated in float32.

    Raises:
        ValueError: if the tensors do not fit each other, when called as an operator.
        BackendUnavailableError: if Triton is missing on a GPU, when called as an operator.
    """
    return F.conv2d(x, weight[:, :, None, None])
