"""The parity gate: does an engine compute what the float32 PyTorch model computes?

Every graph runs on seeded inputs at the sizes of ``Profile.corners``, at timesteps 1, 500 and 999, with and without
guidance. An engine passes if no output is missing, NaN or infinite, if the cosine to the reference is at least 0.999,
and if its error is at most ``FACTOR`` times the error that PyTorch itself makes in the same precision (but never less
than a floor of rounding noise, since PyTorch in float32 has no error against itself). Where PyTorch in that precision
gives no finite numbers, the floor takes the place of its error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engines.base import Engine
from icexport.models.precision import Precision
from icexport.parity.cases import Case

MIN_COSINE = 0.999
COSINE_ERROR = math.sqrt(2 * (1 - MIN_COSINE))
"""Relative RMS error at which the cosine falls to ``MIN_COSINE`` if the error has nothing to do with the signal."""
FACTOR = 4.0


@dataclass(frozen=True)
class OutputParity:
    """One output in its worst case, the one with the least room for more error.

    Attributes:
        cosine: cosine similarity to the reference.
        error: RMS error over the RMS of the reference.
        allowed: the error that would just have passed.
        case: name of the case.
        finite: whether every value is finite and the output is there and of the right shape.
    """

    cosine: float
    error: float
    allowed: float
    case: str
    finite: bool

    def __bool__(self) -> bool:
        return self.finite and self.cosine >= MIN_COSINE and self.error <= self.allowed


def compare(
    engine: Engine, reference: Engine, same_dtype: Engine | None, case_list: list[Case], dtype: Precision
) -> dict[str, OutputParity]:
    """Run ``engine`` and ``reference`` on every case and keep the worst of each output.

    Args:
        engine: engine that is judged.
        reference: PyTorch in float32.
        same_dtype: PyTorch in the engine's precision, or None where that is float32 too.
        case_list: inputs in float32; floats are cast to what each engine takes.
        dtype: precision of ``engine``.
    """
    worst: dict[str, OutputParity] = {}
    for case in case_list:
        expected = reference(cast(case.inputs, reference))
        own = same_dtype(cast(case.inputs, same_dtype)) if same_dtype else {}
        found = engine(cast(case.inputs, engine))
        for name, target in expected.items():
            value = found.get(name)
            if value is None or value.shape != target.shape:
                value = torch.full_like(target, math.nan)
            allowed = dtype.floor
            if name in own:
                yardstick = relative_error(own[name], target)
                allowed = max(allowed, FACTOR * (yardstick if math.isfinite(yardstick) else allowed))
            seen = OutputParity(
                cosine(value, target), relative_error(value, target), allowed, case.name, bool(value.isfinite().all())
            )
            if name not in worst or room(seen) < room(worst[name]):
                worst[name] = seen
    return worst


def room(parity: OutputParity) -> float:
    """Return how many times larger the error might be; the smaller, the worse."""
    if not parity.finite:
        return -float("inf")
    return min(parity.allowed / max(parity.error, 1e-30), 1e3 if parity.cosine >= MIN_COSINE else 0.0)


def cast(inputs: Mapping[str, Tensor], engine: Engine) -> dict[str, Tensor]:
    """Return ``inputs`` in the dtypes and on the device that ``engine`` takes."""
    return {spec.name: inputs[spec.name].to(engine.device, spec.dtype) for spec in engine.inputs}


def relative_error(value: Tensor, target: Tensor) -> float:
    """Return the RMS of the difference over the RMS of ``target``, both in float64; NaN counts as infinite."""
    value, target = value.double().cpu(), target.double().cpu()
    error = ((value - target).square().mean() / target.square().mean().clamp(min=1e-24)).sqrt()
    return float(error.nan_to_num(nan=math.inf, posinf=math.inf))


def cosine(value: Tensor, target: Tensor) -> float:
    """Return the cosine similarity of two tensors as flat float64 vectors; two zero vectors agree, NaN gives -1."""
    value, target = value.double().flatten().cpu(), target.double().flatten().cpu()
    if not value.any() and not target.any():
        return 1.0
    found = torch.dot(value, target) / (value.norm() * target.norm()).clamp(min=1e-30)
    return float(found.nan_to_num(nan=-1.0))
