"""Small modules as ONNX files, exported as icexport does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn


def save(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic_shapes: tuple[Any, ...],
    path: Path,
    opset: int = 21,
) -> Path:
    """Export to ``path``, whose folder is made, and return it."""
    path.parent.mkdir(parents=True)
    with torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            dynamo=True,
            opset_version=opset,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=dynamic_shapes,
            verbose=False,
        )
    assert program is not None
    program.save(path, external_data=True)
    return path


def operators(path: Path) -> list[str]:
    """Types of the nodes, in their order."""
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
