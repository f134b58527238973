"""What the ops share on the host: checks of arguments, and the way to Triton."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from engines.errors import BackendUnavailableError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

_LARGEST_GROUP = 2**31 - 2**20  # less than 2^31, because the last block may reach beyond the end


def check_tensors(op: str, tensors: Mapping[str, Tensor], dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """Refuse tensors that are empty, not all on one device, or not all of one of the dtypes.

    Args:
        op: Name for messages.
        tensors: Argument name -> tensor; the first one sets dtype and device.
        dtypes: Those that the op takes.

    Raises:
        ValueError: Naming the tensor, what it is and what was expected.
    """
    first, reference = next(iter(tensors.items()))
    if reference.dtype not in dtypes:
        names = " or ".join(map(str, dtypes))
        raise ValueError(f"{op}: {first} is {reference.dtype}, expected {names}. Cast it first.")
    for name, tensor in tensors.items():
        if tensor.dtype != reference.dtype or tensor.device != reference.device:
            raise ValueError(
                f"{op}: {name} is {tensor.dtype} on {tensor.device}, but {first} is {reference.dtype} on "
                f"{reference.device}. Bring all tensors to one dtype and device."
            )
        if tensor.numel() == 0:
            raise ValueError(f"{op}: {name} is {list(tensor.shape)}, expected at least one element.")


def check_shape(op: str, name: str, tensor: Tensor, expected: tuple[int | str, ...]) -> None:
    """Refuse a tensor of another shape.

    Args:
        op: Name for messages.
        name: Of the argument.
        tensor: The argument.
        expected: One entry an axis: a size, or the name of a free one.

    Raises:
        ValueError: Naming the tensor, its shape and the expected one.
    """
    shape = tuple(tensor.shape)
    if len(shape) != len(expected) or any(
        not isinstance(want, str) and want != got for want, got in zip(expected, shape, strict=True)
    ):
        raise ValueError(f"{op}: {name} is {list(shape)}, expected [{', '.join(map(str, expected))}].")


def check_channels(op: str, name: str, tensor: Tensor, first: int, count: int) -> None:
    """Refuse a range of channels that the tensor does not have.

    Raises:
        ValueError: Naming the range and the number of channels.
    """
    if first < 0 or first + count > tensor.shape[1]:
        raise ValueError(
            f"{op}: channels {first} to {first + count} of {name} are wanted, but it has {tensor.shape[1]}. "
            "Correct first_channel."
        )


def check_groups(op: str, channels: int, num_groups: int, eps: float) -> None:
    """Refuse a GroupNorm that cannot be computed.

    Raises:
        ValueError: If the groups do not divide the channels, or eps is not positive.
    """
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{op}: {num_groups} groups cannot share {channels} channels evenly. Choose a divisor.")
    if not eps > 0:
        raise ValueError(f"{op}: eps is {eps}, expected a positive number.")


def check_size(op: str, height: int, width: int) -> None:
    """Refuse an empty result.

    Raises:
        ValueError: If a side is not positive.
    """
    if height < 1 or width < 1:
        raise ValueError(f"{op}: the result would be {height} x {width} px, expected at least 1 x 1.")


def check_indexable(op: str, group_elements: int) -> None:
    """Refuse a group of channels that the kernels, which count its elements in 32 bits, cannot address.

    Raises:
        ValueError: With the number of elements.
    """
    if group_elements > _LARGEST_GROUP:
        raise ValueError(
            f"{op}: one group has {group_elements} elements, expected at most {_LARGEST_GROUP}. Use smaller maps."
        )


def load_kernel(op: str) -> ModuleType:
    """Import ``engines.kernels.<op>.kernel``, which needs Triton.

    Raises:
        BackendUnavailableError: If Triton is missing or broken. The reference never runs instead of a kernel.
    """
    try:
        return importlib.import_module(f"engines.kernels.{op}.kernel")
    except ImportError as error:
        raise BackendUnavailableError(
            f"icexport::{op} on a GPU needs Triton, which cannot be imported: {error}. Run: pip install triton"
        ) from error
