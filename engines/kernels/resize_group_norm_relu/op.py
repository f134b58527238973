"""``torch.ops.icexport.resize_group_norm_relu``: the reference on a CPU, a Triton kernel on a GPU."""

from __future__ import annotations

from torch import Tensor

from engines.kernels.host import check_channels, check_groups, check_shape, check_size, check_tensors, define_op
from engines.kernels.resize_group_norm_relu import reference

NAME = "resize_group_norm_relu"


def result_shape(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    shift: Tensor,
    first_channel: int,
    height: int,
    width: int,
    num_groups: int,
    eps: float,
) -> tuple[int, ...]:
    """Return ``(B, C, H, W)`` of the result.

    Raises:
        ValueError: if the arguments do not fit each other.
    """
    check_tensors(NAME, {"x": x, "gamma": gamma, "beta": beta, "shift": shift})
    check_shape(NAME, "x", x, ("B", "Cx", "h", "w"))
    check_shape(NAME, "gamma", gamma, ("C",))
    batch, channels = x.shape[0], gamma.shape[0]
    check_shape(NAME, "beta", beta, (channels,))
    check_shape(NAME, "shift", shift, (1 if shift.shape[0] == 1 else batch, channels))
    check_channels(NAME, "x", x, first_channel, channels)
    check_size(NAME, height, width)
    check_groups(NAME, channels, num_groups, eps)
    return batch, channels, height, width


resize_group_norm_relu, run_kernel = define_op(reference.resize_group_norm_relu, result_shape)
