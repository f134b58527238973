"""``torch.ops.icexport.resize_group_norm_relu``: the reference on a CPU, a Triton kernel on a GPU."""

from __future__ import annotations

from torch import Tensor
from torch.library import custom_op

from engines.kernels.host import check_channels, check_groups, check_shape, check_size, check_tensors, load_kernel
from engines.kernels.resize_group_norm_relu import reference

NAME = "resize_group_norm_relu"


@custom_op(f"icexport::{NAME}", mutates_args=(), device_types="cpu")
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
        first_channel: The op reads channels ``first_channel`` to ``first_channel + C`` of x.
        height: H of the result.
        width: W of the result.
        num_groups: Of the GroupNorm, whose statistics are those of the resized map, in float32.
        eps: Of the GroupNorm.

    Returns:
        ``[B,C,H,W]``, contiguous.

    Raises:
        ValueError: If the arguments do not fit each other.
        BackendUnavailableError: On a GPU without Triton.
    """
    _check(x, gamma, beta, shift, first_channel, height, width, num_groups, eps)
    return reference.resize_group_norm_relu(
        x.contiguous(), gamma, beta, shift, first_channel, height, width, num_groups, eps
    )


@resize_group_norm_relu.register_fake
def _empty(
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
    _check(x, gamma, beta, shift, first_channel, height, width, num_groups, eps)
    return x.new_empty((x.shape[0], gamma.shape[0], height, width))


@resize_group_norm_relu.register_kernel("cuda")
def run_kernel(
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
    """What a GPU runs; on CPU tensors only in Triton's interpreter."""
    out: Tensor = _empty(x, gamma, beta, shift, first_channel, height, width, num_groups, eps)
    tensors = (tensor.contiguous() for tensor in (x, gamma, beta, shift))
    load_kernel(NAME).launch(*tensors, first_channel, num_groups, eps, out)
    return out


def _check(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    shift: Tensor,
    first_channel: int,
    height: int,
    width: int,
    num_groups: int,
    eps: float,
) -> None:
    check_tensors(NAME, {"x": x, "gamma": gamma, "beta": beta, "shift": shift})
    check_shape(NAME, "x", x, ("B", "Cx", "h", "w"))
    check_shape(NAME, "gamma", gamma, ("C",))
    channels = gamma.shape[0]
    check_shape(NAME, "beta", beta, (channels,))
    check_shape(NAME, "shift", shift, (1 if shift.shape[0] == 1 else x.shape[0], channels))
    check_channels(NAME, "x", x, first_channel, channels)
    check_size(NAME, height, width)
    check_groups(NAME, channels, num_groups, eps)
