"""What is known of how well pictures obey their control maps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class StepReading:
    """What the probe read at one step.

    Attributes:
        index: 0-based number of the UNet call.
        timestep: timestep of the noise schedule, 999 (noise) to 0 (picture).
        errors: for each picture, mean squared error of the reading against its control map, both in [0,1].
    """

    index: int
    timestep: float
    errors: list[float]


@dataclass(frozen=True)
class FidelityReport:
    """How well the pictures obey their control maps. ``bool(report)`` is the verdict.

    Attributes:
        condition: name of the condition.
        metric: metric of ``scores``, with ``unit`` and ``higher_is_better``.
        unit: unit of ``scores``.
        higher_is_better: whether higher scores are better.
        scores: for each picture, the final score; None where no pictures were decoded (``output_type="latent"``).
        steps: the probe's readings while sampling; empty without a probe.
        heat_map: float32 ``[B,h,w]`` in [0,1], squared error of the last reading at the probe's resolution, or None.
        calibrated: whether the step readings were mapped to expected final scores. Not yet: False.
        expected: how many step readings were asked for; None: not known.
    """

    condition: str
    metric: str
    unit: str
    higher_is_better: bool
    scores: list[float] | None
    steps: list[StepReading] = field(default_factory=list)
    heat_map: NDArray[np.float32] | None = None
    calibrated: bool = False
    expected: int | None = None

    def __bool__(self) -> bool:
        """Give the verdict.

        Without calibration there is no threshold to miss: what fails is a NaN or infinite value, and another number of
        readings than was asked for, as when a callback ends a call before its last step.
        """
        if self.expected not in (None, len(self.steps)):
            return False
        values = [*(self.scores or []), *(error for step in self.steps for error in step.errors)]
        return all(math.isfinite(value) for value in values)

    def first(self, count: int) -> FidelityReport:
        """Return the report of the first so many pictures."""
        steps = [replace(step, errors=step.errors[:count]) for step in self.steps]
        scores = None if self.scores is None else self.scores[:count]
        heat_map = None if self.heat_map is None else self.heat_map[:count]
        return replace(self, scores=scores, steps=steps, heat_map=heat_map)

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary without the heat map."""
        return {
            "condition": self.condition,
            "metric": self.metric,
            "unit": self.unit,
            "higher_is_better": self.higher_is_better,
            "scores": self.scores,
            "passed": bool(self),
            "calibrated": self.calibrated,
            "readings_expected": self.expected,
            "steps": [{"index": s.index, "timestep": s.timestep, "errors": s.errors} for s in self.steps],
        }
