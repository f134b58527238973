"""The optimisation profiles of a plan: which input shapes it takes, and which profile is the best for some shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engines.base import TensorSpec
from engines.errors import ShapeError

_LISTED_INPUTS = 3

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Range:
    """Shapes of one input that a profile allows, ends included.

    Attributes:
        low: smallest size of every axis.
        high: largest size of every axis.
    """

    low: Shape
    high: Shape

    def __contains__(self, shape: Shape) -> bool:
        return all(low <= size <= high for low, size, high in zip(self.low, shape, self.high, strict=True))

    def __str__(self) -> str:
        ends = zip(self.low, self.high, strict=True)
        return f"[{', '.join(str(low) if low == high else f'{low}..{high}' for low, high in ends)}]"

    @property
    def width(self) -> int:
        """Sum over the axes of what lies between the ends."""
        return sum(self.high) - sum(self.low)


Profile = Mapping[str, Range]
"""Range of every input."""


def read_profiles(engine: Any, inputs: Sequence[TensorSpec]) -> list[Profile]:
    """Read all profiles of an engine.

    Args:
        engine: ``ICudaEngine``.
        inputs: specs of its inputs.
    """
    return [_read(engine, inputs, index) for index in range(engine.num_optimization_profiles)]


def choose_profile(profiles: Sequence[Profile], shapes: Mapping[str, Shape], plan: str) -> int:
    """Return the index of the narrowest profile that allows the shapes: it is tuned best for them.

    Args:
        profiles: all profiles of the plan.
        shapes: shape of every input, by name.
        plan: what to call the plan in messages.

    Raises:
        ShapeError: if no profile allows the shapes; the message lists what is allowed.
    """
    fitting = {
        sum(allowed.width for allowed in profile.values()): index
        for index, profile in enumerate(profiles)
        if all(shape in profile[name] for name, shape in shapes.items())
    }
    if fitting:
        return fitting[min(fitting)]
    names = [name for name in shapes if any(shapes[name] not in profile[name] for profile in profiles)]
    shown, hidden = names[:_LISTED_INPUTS], len(names[_LISTED_INPUTS:])
    got = ", ".join(f"{name} {list(shapes[name])}" for name in shown) + (f" and {hidden} more" if hidden else "")
    allowed = " or ".join(", ".join(f"{name} {profile[name]}" for name in shown) for profile in profiles)
    raise ShapeError(
        f"{plan} was not built for {got}; it takes {allowed}. Use one, or build for others: "
        "icexport build --batch-size N --height N --width N, where N may be min:opt:max."
    )


def _read(engine: Any, inputs: Sequence[TensorSpec], index: int) -> Profile:
    ranges = {}
    for spec in inputs:
        low = high = tuple(engine.get_tensor_shape(spec.name))
        if -1 in low:
            low, _, high = map(tuple, engine.get_tensor_profile_shape(spec.name, index))
        ranges[spec.name] = Range(low, high)
    return ranges
