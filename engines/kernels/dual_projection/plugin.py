"""``dual_projection`` as a TensorRT plugin; see ``engines.kernels.plugins``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engines.kernels import tuning
from engines.kernels.plugins import Call, Launch

NAME = "dual_projection"


def output_shape(shapes: Mapping[str, Any], attributes: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return ``[B,O,h,w]``, from numbers or expressions."""
    x, weight = shapes["x"], shapes["weight"]
    return x[0], weight[0], x[2], x[3]


def launch(call: Call) -> Launch:
    """Return one program a tile and sample."""
    _, channels, height, width = call.shapes["x"]
    outputs = call.shapes["weight"][0]
    pixels = height * width
    config = tuning.choose(NAME, call.capability, call.usual_batch * pixels, call.dtype.itemsize)
    tiles = -(-outputs // config.constants["BLOCK_M"]) * -(-pixels // config.constants["BLOCK_N"])
    return Launch((tiles, call.batch), (channels, outputs, pixels), {}, config)
