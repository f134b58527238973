"""What the operators share on the host: their definition, checks of arguments, and the way to Triton."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, infer_schema

from engines.errors import BackendUnavailableError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

_LARGEST_GROUP = 2**31 - 2**20  # less than 2^31, because the last block may reach beyond the end


def define_op(
    reference: Callable[..., Tensor], result_shape: Callable[..., tuple[int, ...]]
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Make ``torch.ops.icexport.<name>``, with the name and the arguments of its reference.

    On a CPU the operator runs the reference, on a GPU ``launch`` of ``engines.kernels.<name>.kernel``. Both get
    contiguous tensors; ``launch`` also gets the result to fill, as the last argument.

    Args:
        reference: what the operator computes, in plain torch.
        result_shape: takes the operator's arguments and returns the shape of its result, or raises a ValueError if
            they do not fit each other. The result has the dtype and the device of the first argument.

    Returns:
        The operator, and what it does on a GPU, which on CPU tensors works only in Triton's interpreter.
    """
    name = reference.__name__

    def run_reference(*arguments: Any) -> Tensor:
        result_shape(*arguments)
        return reference(*_contiguous(arguments))

    def make_result(*arguments: Any) -> Tensor:
        result: Tensor = arguments[0].new_empty(result_shape(*arguments))
        return result

    def run_kernel(*arguments: Any) -> Tensor:
        result = make_result(*arguments)
        load_kernel(name).launch(*_contiguous(arguments), result)
        return result

    schema = infer_schema(reference, mutates_args=())
    op = custom_op(f"icexport::{name}", run_reference, mutates_args=(), device_types="cpu", schema=schema)
    op.register_fake(make_result)
    op.register_kernel("cuda", run_kernel)
    return op, run_kernel


def check_tensors(op: str, tensors: Mapping[str, Tensor], dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """Refuse tensors that are empty, not all on one device, or not all of one of the dtypes.

    Args:
        op: name of the operator, used in messages.
        tensors: tensor of each argument, by name; the first one sets dtype and device.
        dtypes: types that the operator takes.

    Raises:
        ValueError: if a tensor is refused; names it, what it is and what was expected.
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
        op: name of the operator, used in messages.
        name: name of the argument.
        tensor: the argument.
        expected: one entry an axis: a size, or the name of a free one.

    Raises:
        ValueError: if the shape is another; names the tensor, its shape and the expected one.
    """
    shape = tuple(tensor.shape)
    if len(shape) != len(expected) or any(
        not isinstance(want, str) and want != got for want, got in zip(expected, shape, strict=True)
    ):
        raise ValueError(f"{op}: {name} is {list(shape)}, expected [{', '.join(map(str, expected))}].")


def check_channels(op: str, name: str, tensor: Tensor, first: int, count: int) -> None:
    """Refuse a range of channels that the tensor does not have.

    Raises:
        ValueError: if the range is outside; says the range and the number of channels.
    """
    if first < 0 or first + count > tensor.shape[1]:
        raise ValueError(
            f"{op}: channels {first} to {first + count} of {name} are wanted, but it has {tensor.shape[1]}. "
            "Correct first_channel."
        )


def check_groups(op: str, channels: int, num_groups: int, eps: float) -> None:
    """Refuse a GroupNorm that cannot be computed.

    Raises:
        ValueError: if the groups do not divide the channels, or eps is not positive.
    """
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{op}: {num_groups} groups cannot share {channels} channels evenly. Choose a divisor.")
    if not eps > 0:
        raise ValueError(f"{op}: eps is {eps}, expected a positive number.")


def check_size(op: str, height: int, width: int) -> None:
    """Refuse an empty result.

    Raises:
        ValueError: if a side is not positive.
    """
    if height < 1 or width < 1:
        raise ValueError(f"{op}: the result would be {height} x {width} px, expected at least 1 x 1.")


def check_indexable(op: str, group_elements: int) -> None:
    """Refuse a group of channels that the kernels, which count its elements in 32 bits, cannot address.

    Raises:
        ValueError: if a group is too large; says the number of elements.
    """
    if group_elements > _LARGEST_GROUP:
        raise ValueError(
            f"{op}: one group has {group_elements} elements, expected at most {_LARGEST_GROUP}. Use smaller maps."
        )


def load_kernel(op: str) -> ModuleType:
    """Import ``engines.kernels.<op>.kernel``, which needs Triton.

    Raises:
        BackendUnavailableError: if Triton is missing or broken. The reference never runs instead of a kernel.
    """
    try:
        return importlib.import_module(f"engines.kernels.{op}.kernel")
    except ImportError as error:
        raise BackendUnavailableError(
            f"icexport::{op} on a GPU needs Triton, which cannot be imported: {error}. Run: pip install triton"
        ) from error


def _contiguous(arguments: Iterable[Any]) -> Iterator[Any]:
    return (value.contiguous() if isinstance(value, Tensor) else value for value in arguments)
