"""``torch.ops.icexport.dual_projection``: the reference on a CPU, a Triton kernel on a GPU."""

from __future__ import annotations

from torch import Tensor

from engines.kernels.dual_projection import reference
from engines.kernels.host import check_shape, check_tensors, define_op

NAME = "dual_projection"


def result_shape(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    """Return ``(B, O, h, w)`` of the result.

    Raises:
        ValueError: if the tensors do not fit each other.
    """
    check_tensors(NAME, {"x": x, "weight": weight})
    check_shape(NAME, "x", x, ("B", "C", "h", "w"))
    check_shape(NAME, "weight", weight, ("O", x.shape[1]))
    return x.shape[0], weight.shape[0], *x.shape[2:]


dual_projection, run_kernel = define_op(reference.dual_projection, result_shape)
