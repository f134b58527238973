"""``resize_group_norm_relu`` as a TensorRT plugin; see ``engines.kernels.plugins``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engines.kernels import tuning
from engines.kernels.plugins import Call, Launch

NAME = "resize_group_norm_relu"


def output_shape(shapes: Mapping[str, Any], attributes: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return ``[B,C,H,W]``, from numbers or expressions."""
    return shapes["x"][0], shapes["gamma"][0], attributes["height"], attributes["width"]


def launch(call: Call) -> Launch:
    """Return ``split`` programs a group and sample."""
    _, x_channels, in_height, in_width = call.shapes["x"]
    (channels,) = call.shapes["gamma"]
    height, width, groups = (call.attributes[name] for name in ("height", "width", "num_groups"))
    config = tuning.choose(NAME, call.capability, call.usual_batch * groups, call.dtype.itemsize)
    constants = {
        "GROUPS": groups,
        "CHANNELS": channels // groups,
        "EPS": call.attributes["eps"],
        "RESIZE": (in_height, in_width) != (height, width),
        "SHIFT_PER_SAMPLE": call.shapes["shift"][0] != 1,
    }
    first_channel = call.attributes["first_channel"]
    scalars = (x_channels, first_channel, in_height, in_width, height, width, height * width)
    return Launch((call.batch * groups, config.split), scalars, constants, config)
