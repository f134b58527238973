"""What a backend takes of a CPU's memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Footprint:
    """Factors from the sizes of a model to bytes, as ``benchmarks.real_size --growth`` measured them.

    Attributes:
        weight: resident bytes of a weight, by precision.
        sample: what ControlNet and UNet need for one sample, in float32 maps of the UNet's first level.
        picture: what the decoder needs for one picture, in float32 maps of its last level.
    """

    weight: Mapping[str, float]
    sample: float
    picture: float
