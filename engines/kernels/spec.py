"""What each kernel is: operator, reference, cases with their inputs, and how much work a case is.

Tests, GPU suite and benchmark take everything from here, so that they cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from engines.kernels.dual_projection import op as _dual_projection
from engines.kernels.fidelity_reduce import op as _fidelity_reduce
from engines.kernels.residual_mix import op as _residual_mix
from engines.kernels.resize_group_norm_relu import op as _resize_group_norm_relu

Values = Literal["randn", "zeros", "constant", "huge", "outlier"]
Layout = Literal["contiguous", "channels_last", "strided"]
Size = tuple[int, int, int]

_EPS = 1e-5
_HUGE = 3e4
_CONSTANT = 30_000.5  # the mean of many, taken in float32, is another number
_TAPS = 9
_SEED = 20250702


@dataclass(frozen=True)
class Case:
    """One set of inputs.

    Attributes:
        batch: number of samples, B.
        source: channels, height and width of the map that is read (x, skip, reading).
        target: channels, height and width of the result; for ``fidelity_reduce`` of the target.
        groups: number of groups of the GroupNorm.
        first_channel: where the wanted channels of the source begin.
        shift_per_sample: whether every sample has a shift of its own; only for ``resize_group_norm_relu``.
        normalise_skip: whether the shortcut has a GroupNorm; only for ``residual_mix``.
        values: what the maps contain: ``huge`` is up to 3e4 in magnitude, ``constant`` is about 3e4 everywhere.
        layout: how the maps lie in memory.
        large: whether the maps are as large as those of SD 1.5; such cases are for GPUs.
    """

    batch: int
    source: Size
    target: Size
    groups: int = 1
    first_channel: int = 0
    shift_per_sample: bool = True
    normalise_skip: bool = True
    values: Values = "randn"
    layout: Layout = "contiguous"
    large: bool = False

    def __str__(self) -> str:
        """Return the short name, unique among the cases of an operator."""
        sizes = ["x".join(map(str, size)) for size in (self.source, self.target)]
        marks = {"one_shift": not self.shift_per_sample, "plain_skip": not self.normalise_skip}
        details = [f"g{self.groups}+{self.first_channel}", *(mark for mark, applies in marks.items() if applies)]
        return "-".join([f"B{self.batch}", *sizes, *details, self.values, self.layout])


@dataclass(frozen=True)
class KernelSpec:
    """One operator.

    Attributes:
        name: name of the operator in the namespace ``icexport``.
        op: the operator.
        reference: the operator in plain torch, in any floating-point type.
        run_kernel: what the operator does on a GPU; on CPU tensors it works only in Triton's interpreter.
        dtypes: types that the operator takes.
        cases: inputs to test, and the large ones to measure.
        arguments: makes the positional arguments from (case, dtype, device), always the same ones.
        traffic_bytes: counts the least bytes to and from memory from (case, bytes of an element).
        flops: counts the floating-point operations of a case; an addition or multiplication counts 1.
    """

    name: str
    op: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    run_kernel: Callable[..., Tensor]
    dtypes: tuple[torch.dtype, ...]
    cases: tuple[Case, ...]
    arguments: Callable[[Case, torch.dtype, torch.device], tuple[Any, ...]]
    traffic_bytes: Callable[[Case, int], int]
    flops: Callable[[Case], int]


class _Draw:
    """Makes the tensors of one case."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        self._case, self._dtype, self._device = case, dtype, device
        self._generator = torch.Generator().manual_seed(_SEED)

    def map(self, size: Size) -> Tensor:
        """Return ``[B, *size]`` with the case's values and layout."""
        shape = (self._case.batch, *size)
        value = self._values(shape)
        if self._case.values == "outlier":
            value.view(-1)[value.numel() // 2] = _HUGE
        value = value.to(self._device, self._dtype)
        if self._case.layout == "channels_last":
            return value.to(memory_format=torch.channels_last)
        if self._case.layout == "strided":
            return value.repeat_interleave(2, dim=3)[..., ::2]
        return value

    def unit_map(self, size: Size) -> Tensor:
        """Return ``[B, *size]`` in [0, 1]: noise, or 0 or 1 throughout, or zeros with a single 1."""
        value = self.map(size).abs()
        return value.clamp(max=1) if self._case.values != "randn" else value.frac()

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Return normally distributed values times ``scale``."""
        return (scale * torch.randn(shape, generator=self._generator)).to(self._device, self._dtype)

    def _values(self, shape: tuple[int, ...]) -> Tensor:
        if self._case.values == "randn":
            return torch.randn(shape, generator=self._generator) + 0.5
        if self._case.values == "huge":
            return _HUGE * (2 * torch.rand(shape, generator=self._generator) - 1)
        if self._case.values == "outlier":
            return torch.randn(shape, generator=self._generator)
        return torch.full(shape, _CONSTANT if self._case.values == "constant" else 0.0)


def _dual_projection_arguments(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    draw, channels = _Draw(case, dtype, device), case.source[0]
    # Half of what keeps the size of the values: float16 must not overflow in the result itself.
    return draw.map(case.source), draw.normal(case.target[0], channels, scale=0.5 / math.sqrt(channels))


def _resize_arguments(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    draw, (channels, height, width) = _Draw(case, dtype, device), case.target
    x = draw.map(case.source)
    shifts = case.batch if case.shift_per_sample else 1
    vectors = draw.normal(channels), draw.normal(channels), draw.normal(shifts, channels)
    return x, *vectors, case.first_channel, height, width, case.groups, _EPS


def _residual_arguments(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    draw = _Draw(case, dtype, device)
    maps = draw.map(case.target), draw.map(case.source)
    accumulated = replace(case, values="randn")
    vectors = (draw.normal(case.target[0]) for _ in range(4))
    mix = draw.normal(_TAPS).abs() / _TAPS
    options = (_TAPS // 2, case.first_channel, case.groups, _EPS, case.normalise_skip)
    return _Draw(accumulated, dtype, device).map(case.target), *maps, *vectors, mix, *options


def _fidelity_arguments(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    draw = _Draw(case, dtype, device)
    return draw.unit_map(case.source), draw.unit_map(case.target)


def _elements(size: Size) -> int:
    return math.prod(size)


def _read(case: Case) -> int:
    """Return elements of the source that one sample needs."""
    return case.target[0] * case.source[1] * case.source[2]


def _dual_projection_traffic(case: Case, element: int) -> int:
    maps = case.batch * (_elements(case.source) + _elements(case.target))
    return element * (maps + case.source[0] * case.target[0])


def _resize_traffic(case: Case, element: int) -> int:
    channels = case.target[0]
    shift = channels * (case.batch if case.shift_per_sample else 1)
    return element * (case.batch * (_read(case) + _elements(case.target)) + 2 * channels + shift)


def _resize_flops(case: Case) -> int:
    resized = case.source[1:] != case.target[1:]
    return case.batch * ((30 if resized else 4) * _read(case) + (14 if resized else 5) * _elements(case.target))


def _residual_traffic(case: Case, element: int) -> int:
    vectors = case.target[0] * (4 if case.normalise_skip else 2)
    return element * (case.batch * (_read(case) + 3 * _elements(case.target)) + vectors)


def _residual_flops(case: Case) -> int:
    resized = case.source[1:] != case.target[1:]
    pixels = (12 + 9 * resized + 3 * case.normalise_skip) * _elements(case.target)
    statistics = (30 if resized else 4) * _read(case) if case.normalise_skip else 0
    return case.batch * (pixels + statistics)


def _fidelity_traffic(case: Case, element: int) -> int:
    return element * case.batch * (_elements(case.source) + _elements(case.target))


def _extremes(case: Case) -> tuple[Case, ...]:
    """Return the case itself, with every other kind of values, and with every other layout."""
    values: tuple[Values, ...] = ("zeros", "constant", "huge", "outlier")
    layouts: tuple[Layout, ...] = ("channels_last", "strided")
    return (
        case,
        *(replace(case, values=value) for value in values),
        *(replace(case, layout=layout) for layout in layouts),
    )


_large = partial(Case, large=True)
_PROJECTIONS = (
    *_extremes(Case(2, (70, 9, 7), (37, 9, 7))),
    Case(1, (1, 1, 1), (1, 1, 1)),
    Case(3, (33, 16, 16), (50, 16, 16)),
    *(
        _large(batch, (channels, side, side), (480, side, side))
        for batch in (1, 2)
        for channels, side in ((1280, 16), (640, 32), (320, 64))
    ),
    _large(1, (96, 64, 64), (384, 64, 64)),
    _large(3, (320, 63, 65), (480, 63, 65)),
    *(_large(1, (channels, side, side), (480, side, side)) for channels, side in ((1280, 24), (640, 48), (320, 96))),
)
_RESIZES = (
    *_extremes(Case(1, (5, 5, 3), (3, 9, 7), 1, 1)),  # by a factor that is not an integer
    *_extremes(Case(1, (5, 9, 7), (5, 9, 7), 1)),  # none, with more channels in a group than a block
    Case(2, (10, 5, 3), (6, 9, 7), 2, 3),
    Case(2, (3, 8, 8), (3, 16, 16), 1, shift_per_sample=False),
    Case(3, (2, 4, 4), (2, 16, 16), 1),
    Case(1, (4, 11, 13), (4, 5, 6), 2),  # down
    Case(1, (2, 1, 1), (2, 4, 3), 2),
    Case(1, (2, 3, 40), (2, 5, 220), 1),
    *(
        _large(batch, (480, side, side), (96, 64, 64), 32, shift_per_sample=per_sample)
        for batch, per_sample in ((1, True), (2, False))
        for side in (16, 32, 64)
    ),
    _large(1, (96, 64, 64), (96, 64, 64), 32),
    _large(3, (480, 31, 33), (96, 63, 65), 32),
    *(_large(1, (480, side, side), (96, 96, 96), 32) for side in (24, 48, 96)),
)
_RESIDUALS = (
    *_extremes(Case(1, (5, 5, 3), (3, 9, 7), 1, 1)),
    *_extremes(Case(1, (5, 9, 7), (5, 9, 7), 1)),
    Case(2, (10, 5, 3), (6, 9, 7), 2, 3),
    Case(2, (3, 8, 8), (3, 16, 16), 1, normalise_skip=False),
    Case(3, (2, 4, 4), (2, 16, 16), 1),
    Case(1, (5, 9, 7), (4, 9, 7), 2, 1, normalise_skip=False),
    Case(1, (4, 11, 13), (4, 5, 6), 2),
    Case(1, (2, 3, 40), (2, 5, 220), 1),
    *(_large(batch, (480, side, side), (384, 64, 64), 32, 96) for batch in (1, 2) for side in (16, 32, 64)),
    _large(3, (480, 31, 33), (384, 63, 65), 32, 96),
    _large(1, (384, 32, 32), (384, 64, 64), 32, normalise_skip=False),
    *(_large(1, (480, side, side), (384, 96, 96), 32, 96) for side in (24, 48, 96)),
)
_FIDELITIES = (
    *_extremes(Case(2, (3, 9, 7), (3, 31, 40))),
    *_extremes(Case(1, (1, 9, 7), (3, 9, 7))),
    Case(3, (1, 16, 16), (3, 64, 64)),
    Case(1, (3, 20, 20), (3, 7, 9)),
    *(_large(batch, (channels, 64, 64), (3, 512, 512)) for batch in (1, 4) for channels in (1, 3)),
    _large(3, (3, 63, 65), (3, 511, 513)),
)


def _spec(
    module: ModuleType,
    arguments: Callable[[Case, torch.dtype, torch.device], tuple[Any, ...]],
    cases: tuple[Case, ...],
    traffic_bytes: Callable[[Case, int], int],
    flops: Callable[[Case], int],
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16),
) -> KernelSpec:
    name = module.NAME
    functions = getattr(module, name), getattr(module.reference, name), module.run_kernel
    return KernelSpec(name, *functions, dtypes, cases, arguments, traffic_bytes, flops)


SPECS = {
    spec.name: spec
    for spec in (
        _spec(
            _dual_projection,
            _dual_projection_arguments,
            _PROJECTIONS,
            _dual_projection_traffic,
            lambda case: 2 * case.batch * case.source[0] * _elements(case.target),
        ),
        _spec(_resize_group_norm_relu, _resize_arguments, _RESIZES, _resize_traffic, _resize_flops),
        _spec(_residual_mix, _residual_arguments, _RESIDUALS, _residual_traffic, _residual_flops),
        _spec(
            _fidelity_reduce,
            _fidelity_arguments,
            _FIDELITIES,
            _fidelity_traffic,
            lambda case: case.batch * case.target[1] * case.target[2] * (9 * case.source[0] + 12),
            (torch.float32,),
        ),
    )
}
