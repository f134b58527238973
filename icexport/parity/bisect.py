"""Which layer breaks parity: every module of a graph, in order, in ONNX Runtime and in PyTorch.

The dynamo exporter writes into every ONNX node which modules it came from. A module whose nodes leave exactly one
value has a known output in both worlds. The error need not grow from layer to layer (what comes from the text alone
stays right behind a bad convolution), so this is a walk in portions, not a binary search.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from icexport.graphs.graph import Graph
from icexport.parity.cases import Case
from icexport.parity.compare import relative_error
from icexport.parity.session import open_session, run_session

_SCOPES = "pkg.torch.onnx.name_scopes"

_PORTION = 32
"""Layers that are compared at a time: their outputs are in memory twice."""


def first_bad_module(model: onnx.ModelProto, folder: Path, graph: Graph, case: Case, allowed: float) -> str | None:
    """Return the path of the first module whose output differs from the float32 reference by more than ``allowed``.

    Args:
        model: the ONNX graph without its weights.
        folder: folder where its weights are.
        graph: the graph's module in float32.
        case: inputs on which parity failed.
        allowed: relative RMS error that is allowed.

    Returns:
        For instance ``unet.mid_block.resnets.0.conv1``; None if every module alone is within bounds.
    """
    values = module_outputs(model)
    names = list(values)
    for start in range(0, len(names), _PORTION):
        portion = names[start : start + _PORTION]
        expected = _record(graph.module, [case.inputs[spec.name] for spec in graph.inputs], portion)
        wanted = list(dict.fromkeys(values[name] for name in expected))
        found = _run(model, wanted, case.inputs, folder) if wanted else {}
        for name in portion:
            if name in expected and _differ(found[values[name]], expected[name], allowed):
                return name
    return None


def _differ(found: Tensor, expected: Tensor, allowed: float) -> bool:
    return found.shape != expected.shape or relative_error(found, expected) > allowed


def module_outputs(model: onnx.ModelProto) -> dict[str, str]:
    """For every module path that leaves exactly one value: that value's name; in the order of running, inner first."""
    made_by: dict[str, tuple[str, ...]] = {}
    place: dict[str, int] = {}
    uses: list[tuple[tuple[str, ...], str]] = [((), output.name) for output in model.graph.output]
    for index, node in enumerate(model.graph.node):
        within = scopes(node)
        uses += [(within, name) for name in node.input]
        made_by |= dict.fromkeys(node.output, within)
        place |= dict.fromkeys(node.output, index)
    leaving: dict[str, set[str]] = {}
    for user, name in uses:
        for scope in made_by.get(name, ()):
            if scope not in user:
                leaving.setdefault(scope, set()).add(name)
    single = {scope: next(iter(names)) for scope, names in leaving.items() if len(names) == 1}
    return dict(sorted(single.items(), key=lambda item: (place[item[1]], -item[0].count("."))))


def scopes(node: onnx.NodeProto) -> tuple[str, ...]:
    """List the modules that a node belongs to, the outermost first; empty for a node that the tool added."""
    text = next((p.value for p in node.metadata_props if p.key == _SCOPES), "[]")
    return tuple(path for path in ast.literal_eval(text)[:-1] if path)


def _record(module: nn.Module, inputs: list[Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return the outputs of the named submodules; one that runs twice or gives no single tensor is left out."""
    found: dict[str, list[object]] = {name: [] for name in names}
    with ExitStack() as hooks, torch.inference_mode():
        for name, submodule in module.named_modules():
            if name in found:
                # The default binds the list of this turn of the loop.
                hooks.enter_context(
                    submodule.register_forward_hook(lambda _m, _a, output, seen=found[name]: seen.append(output))
                )
        module(*inputs)
    outputs = {name: seen[0] for name, seen in found.items() if len(seen) == 1}
    outputs = {n: o[0] if isinstance(o, tuple) and len(o) == 1 else o for n, o in outputs.items()}
    return {name: output for name, output in outputs.items() if isinstance(output, Tensor)}


def _run(model: onnx.ModelProto, values: list[str], inputs: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Return inner values of a graph whose weights lie in ``folder``."""
    found = run_session(open_session(model, values, folder), inputs)
    return {name: torch.from_numpy(value) for name, value in zip(values, found, strict=True)}
