"""One graph to one ONNX file: the dynamo exporter, external data, and a file that is the same every time."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

from engines.base import TensorSpec
from icexport.errors import ExportError
from icexport.export import DEFAULT_OPSET
from icexport.graphs.graph import Graph, example_inputs
from icexport.graphs.profile import SizeRange
from icexport.graphs.shapes import size_of, symbol_of

logger = logging.getLogger(__name__)


_TRACE_KEYS = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node", "pkg.torch.export.graph_signature")


def export_graph(graph: Graph, path: Path, symbols: Mapping[str, SizeRange], opset: int = DEFAULT_OPSET) -> None:
    """Trace ``graph`` and write ``path`` with its weights in ``<path>.data``.

    Args:
        graph: the module, already in the precision that the file shall have.
        path: path of the file, ``….onnx``; its folder exists.
        symbols: range of every symbol in the graph's shapes; a symbol with a fixed size is baked in.
        opset: ONNX opset, one of ``OPSETS``.

    Raises:
        ExportError: torch could not trace the module; the graph and torch's own message are named.
    """
    # Sizes 0 and 1 are special to torch.export, which would bake them in: trace a dynamic axis at 2 or more.
    trace_at = {n: r.opt if r.fixed else min(max(r.opt, 2), r.max) for n, r in symbols.items()}
    inputs = example_inputs(graph.inputs, trace_at)
    dims = {n: Dim(n, min=r.min, max=r.max) for n, r in symbols.items() if not r.fixed}
    dynamic = [_dynamic_shape(spec, dims) for spec in graph.inputs]
    # Residuals and taps come in as *args, which torch.export describes as one nested tuple.
    signature = graph.module.forward.__code__
    named = signature.co_argcount - 1
    shapes = (*dynamic[:named], tuple(dynamic[named:])) if len(dynamic) > named else tuple(dynamic)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about hooks' attributes and about torchvision, which is not needed
            program = torch.onnx.export(
                graph.module.eval(),
                tuple(inputs.values()),
                dynamo=True,
                opset_version=opset,
                input_names=[s.name for s in graph.inputs],
                output_names=[s.name for s in graph.outputs],
                dynamic_shapes=shapes if dims else None,
                external_data=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"The graph {graph.name!r} could not be exported at opset {opset}: {error}") from error
    if program is None:
        raise ExportError(f"torch returned no program for the graph {graph.name!r}.")
    _forget_origin(program.model)
    program.save(path, external_data=True)
    _release_weights(program.model)


def _dynamic_shape(spec: TensorSpec, dims: Mapping[str, Any]) -> dict[int, Any]:
    """Return the free axes of one input, as torch.export takes them."""
    found = {}
    for axis, dimension in enumerate(spec.shape):
        if isinstance(dimension, str) and symbol_of(dimension) in dims:
            found[axis] = size_of(dimension, dims)
    return found


def _release_weights(model: Any) -> None:
    """Let go of the weights: the exporter's rewrite rules remember the graph that they saw last until the next one."""
    for weight in model.graph.initializers.values():
        weight.const_value = None


def _forget_origin(model: object) -> None:
    """Drop the stack traces that torch writes into every node: they name this machine's paths and change the hash."""
    for graph in (model.graph, *(f for f in model.functions.values())):  # type: ignore[attr-defined]
        for node in graph:
            for key in _TRACE_KEYS:
                node.metadata_props.pop(key, None)
    for key in _TRACE_KEYS:
        model.metadata_props.pop(key, None)  # type: ignore[attr-defined]
        model.graph.metadata_props.pop(key, None)  # type: ignore[attr-defined]
