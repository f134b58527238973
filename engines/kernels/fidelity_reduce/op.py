"""``torch.ops.icexport.fidelity_reduce``: the reference on a CPU, a Triton kernel on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from engines.kernels.fidelity_reduce import reference
from engines.kernels.host import check_shape, check_tensors, define_op

NAME = "fidelity_reduce"


def result_shape(reading: Tensor, target: Tensor) -> tuple[int, ...]:
    """Return ``(b, 2)`` of the result.

    Raises:
        ValueError: if the tensors do not fit each other.
    """
    check_tensors(NAME, {"reading": reading, "target": target}, (torch.float32,))
    check_shape(NAME, "target", target, ("b", 3, "H", "W"))
    check_shape(NAME, "reading", reading, (target.shape[0], "1 or 3", "h", "w"))
    if reading.shape[1] not in (1, 3):
        raise ValueError(f"{NAME}: reading has {reading.shape[1]} channels, expected 1 or 3.")
    return target.shape[0], 2


fidelity_reduce, run_kernel = define_op(reference.fidelity_reduce, result_shape)
