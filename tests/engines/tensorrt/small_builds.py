"""Builds of small files, in this process, by the real TensorRT-RTX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engines.errors import EngineError
from engines.tensorrt.build import PlanReport, PlanRequest, build_plan
from tests.engines.tensorrt.onnx_models import FLOAT, HALF, cast, conv, save


def silent(what: str, fraction: float) -> None:
    """Progress that nobody looks at."""


def build(onnx_file: Path, dtype: str = "fp16", **fields: Any) -> PlanReport:
    """Build a plan beside its ONNX file."""
    given = {"targets": (89,), **fields}
    return build_plan(PlanRequest("tensorrt-rtx", onnx_file, onnx_file.with_suffix(".plan"), dtype, **given), silent)


def refuse(onnx_file: Path, match: str, dtype: str = "fp16", **fields: Any) -> str:
    """The message of a build that must fail, and must leave nothing behind."""
    before = sorted(onnx_file.parent.iterdir()) if onnx_file.parent.exists() else []
    with pytest.raises(EngineError, match=match) as error:
        build(onnx_file, dtype, **fields)
    assert (sorted(onnx_file.parent.iterdir()) if onnx_file.parent.exists() else []) == before
    return str(error.value)


def island(path: Path, casts: bool = True) -> Path:
    """x -> conv fp16 -> y; and a conv in fp32, between Casts or on an input of its own."""
    outer, outer_weight = conv("outer", "x", "y", HALF)
    inner, inner_weight = conv("inner", "wide" if casts else "z", "wider", FLOAT)
    values = {"x": HALF, "y": HALF, "wider": FLOAT, "wide" if casts else "z": FLOAT}
    nodes = [outer, inner]
    if casts:
        nodes = [outer, cast("y", "wide", FLOAT), inner, cast("wider", "narrow", HALF)]
        values["narrow"] = HALF
    return save(path, nodes, values, [outer_weight, inner_weight])
