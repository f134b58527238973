"""The probe's graph for engines that run our kernels as plugins, and its twin in plain ONNX.

A node of the domain ``icexport`` names a kernel. TensorRT's parser finds the plugin of that name in the namespace
``plugin_namespace``, and ``aot = 1`` demands its ahead-of-time implementation. The file holds no other definition of
these nodes: without the plugins it cannot be parsed, so that an engine without them is never built by mistake.
``inline_plugins`` gives every node its definition instead, and with it a graph that any ONNX engine runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import onnx
import onnx.inliner
import onnx.parser
import torch
from torch import Tensor

from icexport.errors import ExportError
from icexport.export import DEFAULT_OPSET
from icexport.export.onnx import export_graph
from icexport.graphs.graph import Graph
from icexport.graphs.profile import SizeRange
from icexport.graphs.stable_diffusion import ProbeGraph
from icexport.models.fused_probe import FusedProbe

NAMESPACE = "icexport"
"""Domain of the nodes and namespace of the plugins."""

_OLDEST_OPSET = 21  # of GroupNormalization as torch defines it

_MARKS: dict[str, str | int] = {"plugin_namespace": NAMESPACE, "aot": 1}

# What each node computes, in float32 between its inputs and its output, as the kernels do. Branches on attributes are
# written as selections: a definition is there to be compared with, not to be fast.
_DEFINITIONS = (
    """
    dual_projection <plugin_namespace, aot> (x, weight) => (y) {
        plane = Constant <value_ints = [2, 3]> ()
        kernel = Unsqueeze (weight, plane)
        y = Conv (x, kernel)
    }
    """,
    """
    resize_group_norm_relu <first_channel, height, width, num_groups, eps, plugin_namespace, aot>
        (x, gamma, beta, shift) => (y)
    {
        zero = Constant <value_ints = [0]> ()
        one = Constant <value_ints = [1]> ()
        plane = Constant <value_ints = [2, 3]> ()
        first = Constant <value_int: int = @first_channel> ()
        rows = Constant <value_int: int = @height> ()
        columns = Constant <value_int: int = @width> ()
        begin = Unsqueeze (first, zero)
        channels = Shape (gamma)
        end = Add (begin, channels)
        high = Unsqueeze (rows, zero)
        wide = Unsqueeze (columns, zero)
        size = Concat <axis = 0> (high, wide)
        part = Slice (x, begin, end, one)
        part32 = Cast <to = 1> (part)
        gamma32 = Cast <to = 1> (gamma)
        beta32 = Cast <to = 1> (beta)
        shift32 = Cast <to = 1> (shift)
        resized = Resize <axes = [2, 3], mode = "linear"> (part32, , , size)
        normal = GroupNormalization <epsilon: float = @eps, num_groups: int = @num_groups> (resized, gamma32, beta32)
        active = Relu (normal)
        raised = Unsqueeze (shift32, plane)
        sum = Add (active, raised)
        y = CastLike (sum, x)
    }
    """,
    """
    residual_mix <index, first_channel, num_groups, eps, normalise_skip, plugin_namespace, aot>
        (accumulated, main, skip, main_gamma, main_beta, skip_gamma, skip_beta, mix) => (y)
    {
        zero = Constant <value_ints = [0]> ()
        one = Constant <value_ints = [1]> ()
        first = Constant <value_int: int = @first_channel> ()
        tap = Constant <value_int: int = @index> ()
        chosen = Constant <value_int: int = @normalise_skip> ()
        begin = Unsqueeze (first, zero)
        channels = Shape (main_gamma)
        end = Add (begin, channels)
        size = Shape <start = 2> (main)
        part = Slice (skip, begin, end, one)
        part32 = Cast <to = 1> (part)
        main32 = Cast <to = 1> (main)
        main_gamma32 = Cast <to = 1> (main_gamma)
        main_beta32 = Cast <to = 1> (main_beta)
        skip_gamma32 = Cast <to = 1> (skip_gamma)
        skip_beta32 = Cast <to = 1> (skip_beta)
        mix32 = Cast <to = 1> (mix)
        accumulated32 = Cast <to = 1> (accumulated)
        plain = Resize <axes = [2, 3], mode = "linear"> (part32, , , size)
        normal = GroupNormalization <epsilon: float = @eps, num_groups: int = @num_groups>
            (plain, skip_gamma32, skip_beta32)
        condition = Cast <to = 9> (chosen)
        shortcut = Where (condition, normal, plain)
        branch = GroupNormalization <epsilon: float = @eps, num_groups: int = @num_groups>
            (main32, main_gamma32, main_beta32)
        both = Add (branch, shortcut)
        active = Relu (both)
        weight = Gather (mix32, tap)
        weighted = Mul (active, weight)
        sum = Add (accumulated32, weighted)
        y = CastLike (sum, accumulated)
    }
    """,
)


class _Nodes:
    """Has the operators of ``torch.ops.icexport``, traced as ONNX nodes of the same names."""

    def __getattr__(self, name: str) -> Callable[..., Tensor]:
        operator = getattr(torch.ops.icexport, name).default
        names = [argument.name for argument in operator._schema.arguments]

        def node(*arguments: Tensor | float) -> Tensor:
            given = dict(zip(names, arguments, strict=True))
            tensors = [value for value in given.values() if isinstance(value, Tensor)]
            numbers = {key: value for key, value in given.items() if not isinstance(value, Tensor)}
            # The call itself is only there for the result's shape; nothing reads it, so that the exporter drops it.
            result = operator(*arguments)
            return torch.onnx.ops.symbolic(
                f"{NAMESPACE}::{name}",
                tensors,
                # int(): a bool is no attribute type of ONNX
                {key: int(value) if isinstance(value, bool) else value for key, value in numbers.items()} | _MARKS,
                dtype=result.dtype,
                shape=result.shape,
                version=1,
            )

        return node


class _TracedProbe(FusedProbe):
    ops = _Nodes()


def export_plugin_graph(
    graph: Graph, path: Path, symbols: Mapping[str, SizeRange], opset: int = DEFAULT_OPSET
) -> tuple[str, ...]:
    """Write the probe's graph with a node for every kernel; the arguments are those of ``export_graph``.

    Args:
        graph: graph of ``probe_graph``, in the precision that the file shall have. Its inputs and outputs stay as they
            are.
        path: path of the file, ``….onnx``; its folder exists.
        symbols: range of every symbol; height and width have to be fixed, because they are attributes of the nodes.
        opset: ONNX opset, 21 or later, for the plain nodes.

    Returns:
        The plugins that the file needs, as ``namespace::name``: what a build has to register and to find again.

    Raises:
        ExportError: another graph, an older opset, free height or width, or torch could not trace the module.
    """
    if not isinstance(graph.module, ProbeGraph):
        raise ExportError(f"Only the probe's graph has kernels, got {graph.name!r}. Build the others without plugins.")
    if opset < _OLDEST_OPSET:
        raise ExportError(f"Plugins need opset {_OLDEST_OPSET} or later, got {opset}. Pass --opset {_OLDEST_OPSET}.")
    free = [f"{name} are {symbols[name]}" for name in ("rows", "columns") if not symbols[name].fixed]
    if free:
        raise ExportError(
            f"Plugins need one height and one width, but {', '.join(free)} steps of the latent's multiple. "
            "Build one bundle a size, or build with --no-plugins."
        )
    probe = graph.module.probe
    traced = _TracedProbe(probe.probe if isinstance(probe, FusedProbe) else probe)
    export_graph(replace(graph, module=ProbeGraph(traced)), path, symbols, opset)
    model = onnx.load(path, load_external_data=False)
    for index, node in enumerate(_nodes(model)):
        node.name = f"{node.op_type}_{index}"  # the layer's name in an engine; torch calls all of them "symbolic"
    onnx.save(model, path)
    return plugin_names(model)


def plugin_names(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return the plugins that a graph needs, as ``namespace::name``, sorted; empty for plain ONNX."""
    return tuple(sorted({f"{NAMESPACE}::{node.op_type}" for node in _nodes(model)}))


def inline_plugins(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the same graph in plain ONNX: the definition of each node of ours in the node's place.

    The result runs in any ONNX engine and computes what the kernels shall compute. ``model`` stays as it is.
    """
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    (opset,) = (entry.version for entry in model.opset_import if not entry.domain)
    header = f'<domain: "{NAMESPACE}", opset_import: ["" : {opset}]>'
    whole.functions.extend(onnx.parser.parse_function(header + definition) for definition in _DEFINITIONS)
    plain: onnx.ModelProto = onnx.inliner.inline_local_functions(whole)
    (ours,) = (entry for entry in plain.opset_import if entry.domain == NAMESPACE)
    plain.opset_import.remove(ours)
    return plain


def _nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain == NAMESPACE]
