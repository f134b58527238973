"""The parity gate: does an engine compute what the float32 PyTorch model computes?

Every graph runs on the seeded inputs of ``icexport.parity.cases``. An engine passes if no output is missing, NaN or
infinite, if the cosine to the reference is at least 0.999, and if its error is at most ``FACTOR`` times the error that
PyTorch itself makes in the same precision (but never less than a floor of rounding noise, since PyTorch in float32 has
no error against itself). Where PyTorch in that precision gives no finite numbers, the floor takes the place of its
error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engines.base import Engine
from icexport.models.precision import Precision
from icexport.parity.cases import Case, counted
from icexport.parity.half import WideProducts

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


@dataclass(frozen=True)
class Expected:
    """What an engine has to compute in one case.

    Attributes:
        case: the inputs.
        outputs: float32 outputs of PyTorch for the different samples of the case.
        allowed: error that passes, for each output.
        counted: names of the inputs and outputs whose first axis counts the samples.
    """

    case: Case
    outputs: dict[str, Tensor]
    allowed: dict[str, float]
    counted: frozenset[str]

    def samples(self) -> Iterator[Expected]:
        """Yield every different sample as a case of its own."""
        count = max((len(value) for name, value in self.case.inputs.items() if name in self.counted), default=1)
        for index in range(count):
            inputs, outputs = (
                {name: value[index : index + 1] if name in self.counted else value for name, value in side.items()}
                for side in (self.case.inputs, self.outputs)
            )
            name = f"{self.case.name} sample {index}" if count > 1 else self.case.name
            yield replace(self, case=Case(name, inputs), outputs=outputs)


def expect(
    case_list: Iterable[Case], reference: Engine, same_dtype: Engine | None, dtype: Precision
) -> Iterator[Expected]:
    """Run PyTorch on every case; those that share their inputs cost one run.

    Args:
        case_list: inputs in float32; floats are cast to what each engine takes.
        reference: PyTorch in float32.
        same_dtype: PyTorch in the precision that is to be judged, or None where that is float32 too. Its products are
            summed in float32, see ``icexport.parity.half``.
        dtype: precision that is to be judged.
    """
    known: dict[int, Expected] = {}
    names = counted((*reference.inputs, *reference.outputs))
    for case in case_list:
        if id(case.inputs) not in known:
            outputs = reference(cast(case.inputs, reference))
            with WideProducts():  # type: ignore[no-untyped-call]
                own = same_dtype(cast(case.inputs, same_dtype)) if same_dtype else {}
            errors = {name: relative_error(value, outputs[name]) for name, value in own.items()}
            allowed = {name: _allowed(errors.get(name), dtype.floor) for name in outputs}
            known[id(case.inputs)] = Expected(case, outputs, allowed, names)
        yield replace(known[id(case.inputs)], case=case)


def _allowed(yardstick: float | None, floor: float) -> float:
    """Return the error that passes where PyTorch's own is ``yardstick``: None: not known; infinite: not finite."""
    if yardstick is None:
        return floor
    return max(floor, FACTOR * (yardstick if math.isfinite(yardstick) else floor))


def compare(
    engine: Engine, expected: Iterable[Expected], progress: Callable[[int], None] = lambda _done: None
) -> dict[str, OutputParity]:
    """Run an engine on every case and keep the worst of each output.

    Args:
        engine: engine that is judged.
        expected: what it has to compute.
        progress: told how many cases are done.
    """
    worst: dict[str, OutputParity] = {}
    for number, one in enumerate(expected, start=1):
        case, targets = one.case, one.case.spread(one.outputs, one.counted)
        found = engine(cast(case.spread(case.inputs, one.counted), engine))
        for name, target in targets.items():
            value = found.get(name)
            if value is None or value.shape != target.shape:
                value = torch.full_like(target, math.nan)
            seen = OutputParity(
                cosine(value, target),
                relative_error(value, target),
                one.allowed[name],
                case.name,
                bool(value.isfinite().all()),
            )
            if name not in worst or room(seen) < room(worst[name]):
                worst[name] = seen
        progress(number)
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
