"""``torch.ops.icexport.fidelity_reduce``: the reference on a CPU, a Triton kernel on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from engines.kernels.fidelity_reduce import reference
from engines.kernels.host import check_shape, check_tensors, load_kernel

NAME = "fidelity_reduce"


@custom_op(f"icexport::{NAME}", mutates_args=(), device_types="cpu")
def fidelity_reduce(reading: Tensor, target: Tensor) -> Tensor:
    """Error sums of a reading against its control map, at the size of the control map.

    Args:
        reading: ``[b,1 or 3,h,w]`` float32; any strides; a single channel is compared with all three of the target.
        target: ``[b,3,H,W]`` float32.

    Returns:
        ``[b,2]`` float32: sum of ``|e|`` and of ``e^2``, where e is the reading, bilinearly resized to H x W
        (half-pixel centres, no antialiasing), minus the target. Two runs on one device give the same bits.

    Raises:
        ValueError: If the tensors do not fit each other.
        BackendUnavailableError: On a GPU without Triton.
    """
    _check(reading, target)
    return reference.fidelity_reduce(reading.contiguous(), target.contiguous())


@fidelity_reduce.register_fake
def _empty(reading: Tensor, target: Tensor) -> Tensor:
    _check(reading, target)
    return target.new_empty((target.shape[0], 2))


@fidelity_reduce.register_kernel("cuda")
def run_kernel(reading: Tensor, target: Tensor) -> Tensor:
    """What a GPU runs; on CPU tensors only in Triton's interpreter."""
    _check(reading, target)
    sums: Tensor = load_kernel(NAME).launch(reading.contiguous(), target.contiguous())
    return sums


def _check(reading: Tensor, target: Tensor) -> None:
    check_tensors(NAME, {"reading": reading, "target": target}, (torch.float32,))
    check_shape(NAME, "target", target, ("b", 3, "H", "W"))
    check_shape(NAME, "reading", reading, (target.shape[0], "1 or 3", "h", "w"))
    if reading.shape[1] not in (1, 3):
        raise ValueError(f"{NAME}: reading has {reading.shape[1]} channels, expected 1 or 3.")
