"""ONNX Runtime sessions that give back any value of a graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import inliner
from torch import Tensor

_FUNCTIONS = [("", "GroupNormalization")]
"""Operators of the exported graphs for which ONNX Runtime's CPU provider has no kernel, only their definition."""


def open_session(
    model: onnx.ModelProto, values: list[str], folder: Path, *, frugal: bool = False
) -> onnxruntime.InferenceSession:
    """Return a session on a copy of the model whose outputs are ``values``; its weights lie in ``folder``.

    Args:
        model: the graph without its weights.
        values: names of values in it.
        folder: folder where its weights are.
        frugal: whether to keep the graph as it is and run the nodes in their order, which needs little memory if many
            values are read on the way or weights are cast: by itself, ONNX Runtime computes the last one first and
            keeps everything until then.
    """
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    del cut.graph.output[:]
    cut.graph.output.extend(onnx.ValueInfoProto(name=value) for value in values)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if frugal:
        # ONNX Runtime would do this itself and put the new nodes last in its order: every cast of a weight further
        # down would come before them, and the weights be in memory twice.
        cut = inliner.inline_selected_functions(cut, _FUNCTIONS, inline_schema_functions=True)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        options.enable_cpu_mem_arena = False
    return onnxruntime.InferenceSession(cut.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_session(session: onnxruntime.InferenceSession, inputs: Mapping[str, Tensor]) -> list[np.ndarray]:
    """Return the session's outputs on float32 inputs, which become float16 where the graph takes that."""
    halves = {node.name for node in session.get_inputs() if node.type == "tensor(float16)"}
    fed = {node.name: inputs[node.name] for node in session.get_inputs()}
    found: list[np.ndarray] = session.run(
        None, {name: (t.half() if name in halves else t).numpy() for name, t in fed.items()}
    )
    return found


def takes_any_number(model: onnx.ModelProto) -> bool:
    """Tell whether a graph leaves the number of samples free: no input's first axis is a fixed number above 1."""
    first = [value.type.tensor_type.shape.dim[:1] for value in model.graph.input]
    return all(axis.dim_value <= 1 for axes in first for axis in axes)
