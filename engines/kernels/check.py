"""Whether a kernel is as exact as torch: the one criterion of tests, GPU suite and benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engines.kernels.spec import Case, KernelSpec

FACTOR = 2.0
"""A kernel's error may be this many times that of eager torch ..."""
FLOOR = 2.0
"""... plus this many units in the last place of the largest value."""


@dataclass(frozen=True)
class Result:
    """One comparison with the reference in float64.

    Attributes:
        case: name of the case.
        dtype: type of the inputs, e.g. ``"float16"``.
        error: largest deviation of the kernel.
        eager: largest deviation of the reference in the same dtype; infinite if it overflows.
        rms: root of the kernel's mean squared deviation.
        eager_rms: root of the reference's mean squared deviation.
        floor: deviation that is always allowed.
        problems: what is wrong, in words; empty if the kernel passes.
    """

    case: str
    dtype: str
    error: float
    eager: float
    rms: float
    eager_rms: float
    floor: float
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the kernel passes."""
        return not self.problems


def check(
    spec: KernelSpec,
    case: Case,
    device: str | torch.device,
    dtype: torch.dtype,
    run: Callable[..., Tensor] | None = None,
) -> Result:
    """Run one case and compare it with the reference in float64 and with eager torch in the same dtype.

    Memory that the kernel allocates is filled with NaN before, so that an element it does not write is seen. On a GPU,
    two runs must give the same bits.

    Args:
        spec: the operator.
        case: the inputs.
        device: device where to run.
        dtype: type of the inputs.
        run: function to test; None means the operator itself.
    """
    arguments = spec.arguments(case, dtype, torch.device(device))
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = spec.reference(*_to(arguments, torch.float64))
        eager = spec.reference(*arguments)
        result = _run_poisoned(run or spec.op, arguments)
        same = eager.device.type == "cpu" or _same_bits(result, _run_poisoned(run or spec.op, arguments))
    floor = FLOOR * torch.finfo(eager.dtype).eps * exact.abs().max().item()
    error, rms = _deviation(result, exact)
    eager_error, eager_rms = _deviation(eager, exact)
    problems = [] if same else ["two runs differ"]
    if result.shape != eager.shape or result.dtype != eager.dtype:
        problems.append(f"returns {result.dtype} {list(result.shape)}, expected {eager.dtype} {list(eager.shape)}")
    for what, value, limit in (("largest", error, eager_error), ("rms", rms, eager_rms)):
        allowed = floor + (FACTOR * limit if limit < float("inf") else 0.0)
        if not value <= allowed:  # so that NaN fails
            problems.append(f"{what} error is {value:.3g}, allowed are {allowed:.3g} (eager torch: {limit:.3g})")
    name = str(dtype).removeprefix("torch.")
    return Result(str(case), name, error, eager_error, rms, eager_rms, floor, tuple(problems))


def _to(arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(value.to(dtype) if isinstance(value, Tensor) else value for value in arguments)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _deviation(result: Tensor, exact: Tensor) -> tuple[float, float]:
    """Return the largest and root mean square deviation; infinite instead of NaN."""
    if result.shape != exact.shape:
        return float("inf"), float("inf")
    difference = (result.double() - exact).abs()
    values = difference.max(), difference.square().mean().sqrt()
    largest, rms = (torch.nan_to_num(value, nan=float("inf"), posinf=float("inf")).item() for value in values)
    return largest, rms


def _run_poisoned(run: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Tensor:
    """Run while torch fills new memory with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filling = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    try:
        return run(*arguments)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filling
