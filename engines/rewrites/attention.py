"""Attention as one node of ONNX Runtime, which never writes the score matrix.

Below opset 23, ONNX has no operator for attention: torch exports MatMul, Softmax and MatMul with the scores
``[B,N,S,S]`` in between (N heads, S tokens), which at 512 px are a gigabyte for a guided picture, and ONNX Runtime
fuses none of it. ``com.microsoft.MultiHeadAttention`` computes the same in blocks. The bundle's graphs stay plain
ONNX: the rewrite is made for ONNX Runtime alone, when its engine is built.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

DOMAIN = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

_SWAP_HEADS = (0, 2, 1, 3)
_RANK = 3  # [B,S,N*D]


@dataclass(frozen=True)
class _Attention:
    """One attention as torch exports it; its inputs and the output of ``last`` are ``[B,S,N*D]``."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    last: ir.Node
    heads: int
    scale: float


def fuse_attention(model: ir.Model) -> int:
    """Make one node of every attention without a mask; return how many there were."""
    found = [match for node in model.graph if (match := _match(node))]
    for match in found:
        _replace(model.graph, match)
    if found:
        model.opset_imports.setdefault(DOMAIN, 1)
        RemoveUnusedNodesPass()(model)
    return len(found)


def _match(softmax: ir.Node) -> _Attention | None:
    """Return the attention around a Softmax; None for any other node, and where something else joins in, as a mask."""
    if softmax.op_type != "Softmax":
        return None
    scores = _made_by(softmax.inputs[0], "MatMul")
    product = _only_reader(softmax.outputs[0], "MatMul")
    if scores is None or product is None or product.inputs[0] is not softmax.outputs[0]:
        return None
    query, query_scale = _unscaled(scores.inputs[0])
    key, key_scale = _unscaled(scores.inputs[1])
    query, key, value = _merged(query), _merged(_untransposed(key)), _merged(product.inputs[1])
    swap = _only_reader(product.outputs[0], "Transpose")
    join = _only_reader(swap.outputs[0], "Reshape") if swap is not None and _swaps_heads(swap) else None
    heads = product.outputs[0].shape[1] if product.outputs[0].shape is not None else None
    if query is None or key is None or value is None or join is None or not isinstance(heads, int):
        return None
    if any(v.shape is None or len(v.shape) != _RANK for v in (query, key, value, join.outputs[0])):
        return None
    return _Attention(query, key, value, join, heads, query_scale * key_scale)


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """Return what is multiplied by a constant, and the constant: torch scales query and key by a root each."""
    product = _made_by(value, "Mul")
    if product is None:
        return value, 1.0
    factor = ir.convenience.get_const_tensor(product.inputs[1]) if product.inputs[1] is not None else None
    if factor is None or math.prod(factor.shape.numpy()) != 1:
        return value, 1.0
    return product.inputs[0], float(factor.numpy().reshape(()))


def _untransposed(value: ir.Value | None) -> ir.Value | None:
    """Return the key ``[B,N,S,D]`` of a transposed one ``[B,N,D,S]``, which torch makes by way of three axes."""
    split = _made_by(value, "Reshape")
    swap = _made_by(split.inputs[0], "Transpose") if split is not None else None
    flat = _made_by(swap.inputs[0], "Reshape") if swap is not None and _permutation(swap) == (0, 2, 1) else None
    return flat.inputs[0] if flat is not None else None


def _merged(value: ir.Value | None) -> ir.Value | None:
    """Return ``[B,S,N*D]``, of which ``value [B,N,S,D]`` shows the heads."""
    swap = _made_by(value, "Transpose")
    if swap is None or not _swaps_heads(swap):
        return None
    split = _made_by(swap.inputs[0], "Reshape")
    return split.inputs[0] if split is not None else None


def _replace(graph: ir.Graph, match: _Attention) -> None:
    old = match.last
    node = ir.node(
        "MultiHeadAttention",
        [match.query, match.key, match.value],
        {"num_heads": match.heads, "scale": match.scale},
        domain=DOMAIN,
        name=f"{old.name}_attention",
    )
    node.metadata_props.update(old.metadata_props)  # the modules that it belongs to
    ir.convenience.replace_nodes_and_values(graph, old, [old], [node], old.outputs, node.outputs)


def _made_by(value: ir.Value | None, operator: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operator else None


def _only_reader(value: ir.Value, operator: str) -> ir.Node | None:
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.op_type != operator:
        return None
    return uses[0].node


def _swaps_heads(node: ir.Node) -> bool:
    return _permutation(node) == _SWAP_HEADS


def _permutation(node: ir.Node) -> Sequence[int]:
    return tuple(node.attributes["perm"].as_ints())
