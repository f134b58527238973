"""``torch.ops.icexport.dual_projection``: the reference on a CPU, a Triton kernel on a GPU."""

from __future__ import annotations

from torch import Tensor
from torch.library import custom_op

from engines.kernels.dual_projection import reference
from engines.kernels.host import check_shape, check_tensors, load_kernel

NAME = "dual_projection"


@custom_op(f"icexport::{NAME}", mutates_args=(), device_types="cpu")
def dual_projection(x: Tensor, weight: Tensor) -> Tensor:
    """1x1 convolution without bias.

    Args:
        x: ``[B,C,h,w]`` float32, float16 or bfloat16; any strides.
        weight: ``[O,C]``, of the same dtype; for the probe the rows of its first convolution, then of its shortcut.

    Returns:
        ``[B,O,h,w]``, contiguous, accumulated in float32.

    Raises:
        ValueError: If the tensors do not fit each other.
        BackendUnavailableError: On a GPU without Triton.
    """
    _check(x, weight)
    return reference.dual_projection(x.contiguous(), weight.contiguous())


@dual_projection.register_fake
def _empty(x: Tensor, weight: Tensor) -> Tensor:
    _check(x, weight)
    return x.new_empty((x.shape[0], weight.shape[0], *x.shape[2:]))


@dual_projection.register_kernel("cuda")
def run_kernel(x: Tensor, weight: Tensor) -> Tensor:
    """What a GPU runs; on CPU tensors only in Triton's interpreter."""
    out: Tensor = _empty(x, weight)
    load_kernel(NAME).launch(x.contiguous(), weight.contiguous(), out)
    return out


def _check(x: Tensor, weight: Tensor) -> None:
    check_tensors(NAME, {"x": x, "weight": weight})
    check_shape(NAME, "x", x, ("B", "C", "h", "w"))
    check_shape(NAME, "weight", weight, ("O", x.shape[1]))
