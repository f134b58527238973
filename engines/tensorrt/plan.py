"""What a plan shall be, and what came of it; both survive a trip through JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.errors import EngineError
from engines.tensorrt.api import FLAVOURS
from engines.tensorrt.onnx_file import FLOATS

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, usual and largest shape of an input."""

_LEVELS = range(6)


@dataclass(frozen=True)
class PlanRequest:
    """What to build.

    Args:
        flavour: key of ``engines.tensorrt.api.FLAVOURS``.
        onnx: the typed ONNX file; external data lie beside it.
        plan: where the plan goes; its folder exists. A plan that is there is replaced at the end, or not at all.
        dtype: ``"fp32"``, ``"fp16"`` or ``"bf16"``: what the file is expected to compute in, apart from its islands.
        profiles: one mapping per optimisation profile: the shapes of every input with free axes, and of no other.
        targets: compute capabilities, times ten, to build for; TensorRT-RTX only. None means all that it knows.
        optimization_level: 0 (quick to build) to 5 (may run faster).
        workspace_bytes: limit of the scratch memory that kernels may use; None leaves it to TensorRT.
        timing_cache: file that kernel timings are read from and added to; TensorRT only, TensorRT-RTX times nothing.
        plugins: ``namespace::name`` of the plugins that the file calls; TensorRT only.

    Raises:
        EngineError: if a field is out of its range, or the flavour has no such thing.
    """

    flavour: str
    onnx: Path
    plan: Path
    dtype: str
    profiles: tuple[Mapping[str, Shapes], ...] = ()
    targets: tuple[int, ...] = ()
    optimization_level: int = 3
    workspace_bytes: int | None = None
    timing_cache: Path | None = None
    plugins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = [*self._problems(), *(self._flavour_problems() if self.flavour in FLAVOURS else ())]
        if problems:
            raise EngineError(f"a plan cannot be built like this: {'; '.join(problems)}.")

    def _problems(self) -> Iterator[str]:
        if self.flavour not in FLAVOURS:
            yield f"flavour {self.flavour!r}, expected {' or '.join(FLAVOURS)}"
        if self.dtype not in FLOATS:
            yield f"dtype {self.dtype!r}, expected one of {', '.join(FLOATS)}"
        if self.optimization_level not in _LEVELS:
            yield f"optimisation level {self.optimization_level}, expected 0 to 5"
        if self.workspace_bytes is not None and self.workspace_bytes < 1:
            yield f"workspace of {self.workspace_bytes} bytes, expected more than 0"
        for number, profile in enumerate(self.profiles):
            for name, shapes in profile.items():
                if not _in_order(shapes):
                    yield f"profile {number}: {name} {shapes}, expected smallest <= usual <= largest"

    def _flavour_problems(self) -> Iterator[str]:
        if not FLAVOURS[self.flavour].cross_builds:
            if self.targets:
                yield f"targets {self.targets}: TensorRT builds for the GPU at hand only, leave them out"
            return
        if self.timing_cache is not None:
            yield "TensorRT-RTX times no kernels, leave the timing cache out"
        if self.plugins:
            yield f"TensorRT-RTX takes no plugins ({', '.join(self.plugins)}), build without them"

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON knows it; `from_json` turns it back."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PlanRequest:
        """Return the request that `as_json` was called on."""
        profiles = tuple({name: _shapes(shapes) for name, shapes in profile.items()} for profile in data["profiles"])
        paths = {name: Path(data[name]) for name in ("onnx", "plan", "timing_cache") if data[name] is not None}
        lists = {name: tuple(data[name]) for name in ("targets", "plugins")}
        return cls(**{**data, **paths, **lists, "profiles": profiles})


@dataclass(frozen=True)
class PlanReport:
    """What was built.

    Attributes:
        flavour: key of ``engines.tensorrt.api.FLAVOURS``.
        version: version of the library.
        targets: compute capabilities, times ten; empty if none were asked for.
        parse_seconds: time for reading the ONNX file.
        build_seconds: time for building.
        peak_memory_bytes: largest resident memory of the process that built; None where the system does not tell.
        plan_bytes: size of the plan.
        layers: number of layers of what ``precision`` was read from.
        precision: number of layer outputs of each type (``"fp16"``, ``"int64"`` ...).
        plugins: plugins that were found.
        read_from: ``"engine"`` if the plan could be loaded here, else ``"network"``: the strongly typed network that
            was parsed from the file.
        warnings: warnings of the library, each once.
    """

    flavour: str
    version: str
    targets: tuple[int, ...]
    parse_seconds: float
    build_seconds: float
    peak_memory_bytes: int | None
    plan_bytes: int
    layers: int
    precision: Mapping[str, int]
    plugins: tuple[str, ...]
    read_from: str
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON knows it; `from_json` turns it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PlanReport:
        """Return the report that `as_json` was called on."""
        return cls(**{**data, **{name: tuple(data[name]) for name in ("targets", "plugins", "warnings")}})


def _shapes(data: Sequence[Sequence[int]]) -> Shapes:
    smallest, usual, largest = (tuple(shape) for shape in data)
    return smallest, usual, largest


def _in_order(shapes: Shapes) -> bool:
    """Tell whether three shapes are of one rank and grow from the first to the last."""
    return len({len(shape) for shape in shapes}) == 1 and all(
        0 < low <= usual <= high for low, usual, high in zip(*shapes, strict=True)
    )
