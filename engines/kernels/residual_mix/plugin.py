"""``residual_mix`` as a TensorRT plugin; see ``engines.kernels.plugins``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engines.kernels import tuning
from engines.kernels.plugins import Call, Launch

NAME = "residual_mix"


def output_shape(shapes: Mapping[str, Any], attributes: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return ``[B,P,H,W]``, from numbers or expressions."""
    return tuple(shapes["accumulated"])


def launch(call: Call) -> Launch:
    """Return ``split`` programs a group and sample."""
    _, channels, height, width = call.shapes["main"]
    _, skip_channels, in_height, in_width = call.shapes["skip"]
    index, first_channel, groups = (call.attributes[name] for name in ("index", "first_channel", "num_groups"))
    config = tuning.choose(NAME, call.capability, call.usual_batch * groups, call.dtype.itemsize)
    constants = {
        "GROUPS": groups,
        "CHANNELS": channels // groups,
        "EPS": call.attributes["eps"],
        "RESIZE": (in_height, in_width) != (height, width),
        "NORMALISE": bool(call.attributes["normalise_skip"]),
    }
    scalars = (index, skip_channels, first_channel, in_height, in_width, height, width, height * width)
    return Launch((call.batch * groups, config.split), scalars, constants, config)
