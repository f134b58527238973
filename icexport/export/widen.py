"""Surgery on typed ONNX graphs: some nodes in float32, or all of them in float32 with the rounding kept.

Values keep their names and types. The float32 twin of a value has the suffix ``.fp32``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor

from icexport.export.precision import WIDE

EXACT, ROUNDED = ".exact", ".rounded"
"""Suffixes of the float32 twins of a value before and after rounding, in ``rounding``."""


def values_of(model: onnx.ModelProto, kind: int = TensorProto.FLOAT16) -> set[str]:
    """Return the names of all values and weights of one element type."""
    graph = model.graph
    values = (*graph.value_info, *graph.input, *graph.output)
    found = {value.name for value in values if value.type.tensor_type.elem_type == kind}
    return found | {tensor.name for tensor in graph.initializer if tensor.data_type == kind}


def widen(model: onnx.ModelProto, moved: Collection[int]) -> onnx.ModelProto:
    """Return a copy of a float16 graph in which some nodes run in float32, with casts at the borders only.

    Args:
        model: the graph; all its values have known types.
        moved: indices of the nodes that run in float32.
    """
    halves = values_of(model)
    kept = {output.name for output in model.graph.output}
    kept.update(n for index, node in enumerate(model.graph.node) if index not in moved for n in node.input)
    wide: dict[str, None] = {}
    nodes = []
    for index, node in enumerate(model.graph.node):
        if index not in moved:
            nodes.append(node)
            continue
        for name in dict.fromkeys(name for name in node.input if name in halves and name not in wide):
            nodes.append(_cast(name, name + WIDE, TensorProto.FLOAT))
            wide[name] = None
        nodes.append(_twin(node, halves, WIDE, WIDE))
        for name in (name for name in node.output if name in halves):
            wide[name] = None
            if name in kept:
                nodes.append(_cast(name + WIDE, name, TensorProto.FLOAT16))
    changed = _with_nodes(model, nodes)
    _describe_values(changed, wide)
    return changed


def widen_weights(model: onnx.ModelProto, folder: Path) -> None:
    """Replace casts of weights by weights: what nodes of both types use is there twice, what no node uses is gone.

    Args:
        model: model from ``widen``; changed in place.
        folder: folder where its external weights are.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes, twins = [], []
    for node in graph.node:
        if node.op_type != "Cast" or node.input[0] not in weights:
            nodes.append(node)
            continue
        tensor = TensorProto()
        tensor.CopyFrom(weights[node.input[0]])
        if tensor.data_location == TensorProto.EXTERNAL:
            load_external_data_for_tensor(tensor, str(folder))
        twins.append(_as_float(tensor, node.output[0]))
    used = {name for node in nodes for name in node.input}
    remaining = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend([*remaining, *twins])
    graph.node.extend(nodes)


def rounding(model: onnx.ModelProto, kind: int) -> onnx.ModelProto:
    """Return a copy that computes in float32 and rounds every value that is of a lower type in ``model`` to that type.

    This is what a GPU does with sums in float32, and what any CPU can compute. ONNX Runtime's own way on a CPU is the
    same except that it leaves out roundings between neighbours.

    Args:
        model: the graph; all its values have known types.
        kind: the lower type, float16 or bfloat16.

    Returns:
        A graph whose inputs of the lower type are float32; its outputs of that type are there as ``y.rounded``, too,
        in float32.
    """
    low = values_of(model, kind)
    changed = _with_nodes(model, [])
    nodes = changed.graph.node
    widened: set[str] = set()
    for value in changed.graph.input:
        if value.name in low:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
            nodes.append(_cast(value.name, value.name + EXACT, kind))
            nodes.append(_cast(value.name + EXACT, value.name + ROUNDED, TensorProto.FLOAT))
            widened.add(value.name)
    for node in model.graph.node:
        for name in dict.fromkeys(name for name in node.input if name in low and name not in widened):
            nodes.append(_cast(name, name + ROUNDED, TensorProto.FLOAT))
            widened.add(name)
        nodes.append(_twin(node, low, ROUNDED, EXACT))
        for name in (name for name in node.output if name in low):
            rounded = _cast(name + EXACT, name, kind)
            rounded.metadata_props.extend(node.metadata_props)  # the rounding is the module's
            nodes.append(rounded)
    outputs = (output.name for output in model.graph.output)
    nodes.extend(_cast(n, n + ROUNDED, TensorProto.FLOAT) for n in outputs if n in low and n not in widened)
    return changed


def _cast(source: str, target: str, kind: int) -> onnx.NodeProto:
    """Return a cast that belongs to no module, so that bisection does not take it for a second output of one."""
    return helper.make_node("Cast", [source], [target], name=f"cast_{source}_to_{target}", to=kind)


def _twin(node: onnx.NodeProto, low: Collection[str], read: str, write: str) -> onnx.NodeProto:
    """Return a node's twin in float32: on values with these suffixes, and with attributes that say so."""
    twin = onnx.NodeProto()
    twin.CopyFrom(node)
    twin.input[:] = [name + read if name in low else name for name in node.input]
    twin.output[:] = [name + write if name in low else name for name in node.output]
    kinds = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    for attribute in twin.attribute:
        if attribute.name in ("to", "dtype") and attribute.i in kinds:
            attribute.i = TensorProto.FLOAT
        if attribute.t.data_type in kinds:
            attribute.t.CopyFrom(_as_float(attribute.t, attribute.t.name))
    return twin


def _as_float(tensor: TensorProto, name: str) -> TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), name)


def _with_nodes(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    return copy


def _describe_values(model: onnx.ModelProto, wide: Iterable[str]) -> None:
    """Set shapes and types of the new values, and drop those of values that are gone."""
    graph = model.graph
    known = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
    twins = []
    for name in wide:
        if name in known:
            twin = onnx.ValueInfoProto()
            twin.CopyFrom(known[name])
            twin.name, twin.type.tensor_type.elem_type = name + WIDE, TensorProto.FLOAT
            twins.append(twin)
    alive = {name for node in graph.node for name in (*node.input, *node.output)}
    remaining = [value for value in (*graph.value_info, *twins) if value.name in alive]
    del graph.value_info[:]
    graph.value_info.extend(remaining)
