"""Precision belongs to the export: which dtypes a graph has, which parts stay float32, and proof from the file.

TensorRT 11 and TensorRT-RTX have no precision flags, so the ONNX file decides. ``fp16`` and ``bf16`` mean weights and
activations in that type, except for the islands below, which every graph has, and in ``fp16`` for those that
``icexport.builder.mixed`` finds necessary for one model.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import onnx

from icexport.errors import ExportError
from icexport.models.precision import Precision

FP32_ISLANDS = {
    "timestep sinusoids": "float16 cannot hold 999 times the smallest frequency exactly enough; cast after them",
    "normalisation statistics": "sums of squares overflow float16; GroupNormalization and LayerNormalization keep "
    "stash_type 1 (float32) and every engine honours it",
}
"""Parts of every fp16 or bf16 graph that compute in float32, each with its reason."""

_FLOATS = ("bfloat16", "double", "float", "float16")

WIDE = ".fp32"
"""Suffix of the float32 twin of a float16 value or weight, in the islands that ``icexport.builder.mixed`` makes."""

_ISLAND_ELEMENTS = 4096
"""A constant of another float type above this size is a weight that was left behind, not an island's table."""


def read_precision(path: Path, expected: Precision) -> dict[str, int]:
    """Count the weights of each element type in an ONNX file, after checking them against what was asked for.

    Raises:
        ExportError: the file holds weights of another float type that belong to no island, or normalises with
            statistics of low precision.
    """
    model = onnx.load(path, load_external_data=False)
    counts: Counter[str] = Counter()
    strays = []
    for tensor in model.graph.initializer:
        name = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
        elements = math.prod(tensor.dims)
        counts[name] += elements
        in_island = expected.overflows and name == "float" and tensor.name.endswith(WIDE)
        if name in _FLOATS and name != expected.onnx_name and elements > _ISLAND_ELEMENTS and not in_island:
            strays.append(f"{tensor.name} ({name}, {elements} elements)")
    for node in model.graph.node:
        if node.op_type in ("GroupNormalization", "LayerNormalization"):
            stash = next((a.i for a in node.attribute if a.name == "stash_type"), 1)
            if stash != onnx.TensorProto.FLOAT:
                strays.append(f"{node.name}: {node.op_type} keeps statistics in type {stash}")
    if strays:
        raise ExportError(f"{path.name} is not the {expected.name} graph that was asked for: {'; '.join(strays)}.")
    return dict(sorted(counts.items()))
