"""What an ONNX file says about itself: types, where its nodes come from, and whether its weights are all there."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from engines.errors import EngineError

_SCOPES = "pkg.torch.onnx.name_scopes"
_NAMESPACE = "namespace"
_DTYPES = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}
FLOATS = tuple(_DTYPES.values())
"""The float types that a plan can be asked for."""

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Ops that do the work: a network that runs them in the wrong precision is not what was asked for."""


class OnnxFile:
    """An ONNX file without its weights.

    Args:
        path: the file; external data lie beside it.

    Raises:
        EngineError: if the file or its data are missing, damaged or cut short; names the file.

    Attributes:
        path: the file.
        nodes: nodes of the main graph, in order.
        types: element type (``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int64"`` ...) of every value whose type the file
            tells.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        graph = _read(path).graph
        _check_external_data(path, graph)
        self.nodes = list(graph.node)
        self.types = {
            value.name: _dtype(value.type.tensor_type.elem_type)
            for value in (*graph.value_info, *graph.input, *graph.output)
        }
        self._weights = {tensor.name for tensor in graph.initializer}
        self.types |= {tensor.name: _dtype(tensor.data_type) for tensor in graph.initializer}

    def describe(self, index: int, name: str = "") -> str:
        """Name a node for a message: ``node 'node_conv' (Conv, from module unet.conv_in)``.

        Args:
            index: index of the node; out of range where TensorRT does not know it.
            name: name of the node; takes precedence if a node has it.
        """
        node = self._node(index, name)
        if node is None:
            return f"node {name!r}" if name else "the graph"
        op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        return f"node {node.name or index!r} ({op}, from {_module(node)})"

    def is_custom(self, index: int, name: str = "") -> bool:
        """Tell whether a node's op is not one of ONNX itself; arguments as in `describe`."""
        node = self._node(index, name)
        return node is not None and node.domain not in ("", "ai.onnx")

    def _node(self, index: int, name: str) -> onnx.NodeProto | None:
        named = next((node for node in self.nodes if name and node.name == name), None)
        return named or (self.nodes[index] if 0 <= index < len(self.nodes) else None)

    def plugin_nodes(self, plugin: str) -> set[str]:
        """Return the names of the nodes that call a plugin.

        Args:
            plugin: plugin as ``namespace::name``.
        """
        namespace, _, name = plugin.partition("::")
        return {node.name for node in self.nodes if node.op_type == name and _plugin_namespace(node) == namespace}

    def strays(self, dtype: str, found: dict[str, str]) -> list[str]:
        """Return weighted nodes that compute in another float type than was asked for, and that no Cast accounts for.

        Whoever wants a part of a graph in another precision writes Casts around it: that part is an island. A part in
        another precision without any Cast is one that was forgotten.

        Args:
            dtype: ``"fp32"``, ``"fp16"`` or ``"bf16"``. fp32 accepts no other type, Cast or not.
            found: types that TensorRT gave to values; they take precedence over those of the file.

        Returns:
            One description a node.
        """
        types = self.types | found
        strays = []
        for index, node in enumerate(self.nodes):
            kind = types.get(node.output[0], "")
            if node.op_type not in WEIGHTED or kind not in FLOATS or kind == dtype:
                continue
            if dtype == "fp32" or not self._borders_on_cast(node, kind, types):
                strays.append(f"{self.describe(index)}: {kind}")
        return strays

    def weighted(self, dtype: str, found: dict[str, str]) -> tuple[int, int]:
        """Count weighted nodes that compute in ``dtype``, and in any float type; ``found`` as in `strays`."""
        types = self.types | found
        kinds = [types.get(node.output[0], "") for node in self.nodes if node.op_type in WEIGHTED]
        return kinds.count(dtype), sum(kind in FLOATS for kind in kinds)

    def _borders_on_cast(self, start: onnx.NodeProto, kind: str, types: dict[str, str]) -> bool:
        """Tell whether the connected part of type ``kind`` around a node has a Cast at its edge."""
        users: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in (*node.input, *node.output):
                if name not in self._weights and types.get(name) == kind:
                    users.setdefault(name, []).append(node)
        seen: set[str] = set()
        todo = [start.output[0]]
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            for node in users.get(name, ()):
                if node.op_type == "Cast":
                    return True
                todo += [other for other in (*node.input, *node.output) if other in users]
        return False


def _read(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise EngineError(
            f"cannot read the ONNX file {path}: {error}. Check the path, or build the graph again."
        ) from error
    except DecodeError as error:
        raise EngineError(
            f"{path} is damaged or cut short, it is no ONNX file: {error}. Export the graph again."
        ) from error
    if not model.graph.node:
        raise EngineError(f"{path} holds no graph: it is empty, cut short or no ONNX file. Export the graph again.")
    return model


def _check_external_data(path: Path, graph: onnx.GraphProto) -> None:
    needed: dict[str, int] = {}
    for tensor in graph.initializer:
        if uses_external_data(tensor):
            info = ExternalDataInfo(tensor)
            size = (
                info.length or math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            )
            needed[info.location] = max(needed.get(info.location, 0), (info.offset or 0) + size)
    for location, size in needed.items():
        file = path.parent / location
        if not file.is_file():
            raise EngineError(f"{path} keeps its weights in {file}, which is missing. Copy it too, or export again.")
        if file.stat().st_size < size:
            raise EngineError(
                f"{file}, the weights of {path.name}, is cut short: {file.stat().st_size} bytes, expected at least "
                f"{size}. Copy it again, or export the graph again."
            )


def _dtype(element: int) -> str:
    name = str(onnx.TensorProto.DataType.Name(element))
    return _DTYPES.get(name, name.lower())


def _module(node: onnx.NodeProto) -> str:
    """Return the path of the module that a node was traced from, which the dynamo exporter of torch writes into it."""
    properties = {prop.key: prop.value for prop in node.metadata_props}
    if _SCOPES in properties:
        scopes = [scope for scope in ast.literal_eval(properties[_SCOPES])[:-1] if scope]
        return f"module {scopes[-1]}" if scopes else "the outermost module"
    return f"module {properties[_NAMESPACE]}" if _NAMESPACE in properties else "an unknown module"


def _plugin_namespace(node: onnx.NodeProto) -> str:
    """Find the namespace in which TensorRT's parser looks for a plugin: an attribute, or else the node's domain."""
    named = next((a.s.decode() for a in node.attribute if a.name == "plugin_namespace"), "")
    return named or node.domain
