"""Mixed precision: the few nodes that float16 cannot carry are moved to float32, in the ONNX file itself.

Two passes decide, and what they saw goes into the manifest:

* Range: the graph runs in float32 and every float16 value's largest magnitude is measured. The nodes that write and
  read one near float16's end become an island: single nodes and not modules, because the residual sums, where values
  grow, belong to no module of their own.
* Parity: the graph runs with every value rounded to float16. While its outputs are too far from PyTorch's, the first
  bad module becomes an island, a few times.

Comparing the outputs of ONNX Runtime on a CPU would do for neither: see ``icexport.parity.simulation``.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
from onnx import helper

from icexport.errors import ExportError
from icexport.export.precision import WIDE
from icexport.export.widen import values_of, widen, widen_weights
from icexport.graphs.graph import Graph
from icexport.host import memory
from icexport.models.precision import Precision
from icexport.parity import bisect
from icexport.parity.cases import Case
from icexport.parity.compare import COSINE_ERROR, Expected, compare, room
from icexport.parity.session import open_session, run_session, takes_any_number
from icexport.parity.simulation import SimulatedEngine
from icexport.progress import Progress, silent

logger = logging.getLogger(__name__)

LARGEST = 65504.0
"""The largest number of float16."""
LIMIT = LARGEST / 4
"""Largest magnitude that stays in float16. The cases are samples, and others reach higher. On the reference model: up
to 3.8 times as high as one seeded and all real cases together, and 9 times as high as three seeded ones alone."""
ROUNDS = 8
"""Modules that the parity pass may move. More of them mean that float16 does not suit the model."""

_SAME_VALUES = (
    *("Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Resize"),
    *("Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"),
)
"""Operators whose outputs are no larger than their inputs: they are as critical as these, and are not measured. This
also spares masks, which hold the most negative number on purpose."""


@dataclass(frozen=True)
class Island:
    """Nodes of one module that run in float32 in a float16 graph, and why.

    Attributes:
        scope: path of the innermost module that the nodes belong to; empty for nodes outside of all modules.
        tensor: name of the value that decided: the largest one that they write or read, or the output that failed.
        reason: ``overflow`` or ``parity``.
        measured: largest magnitude of ``tensor``, or its relative RMS error before the module was moved; None for NaN.
        nodes: how many nodes were moved.
    """

    scope: str
    tensor: str
    reason: str
    measured: float | None
    nodes: int

    def to_json(self) -> dict[str, Any]:
        """Return it as the manifest holds it."""
        return asdict(self)


@dataclass(frozen=True)
class _Finding:
    reason: str
    tensor: str
    measured: float


def stabilise(
    path: Path,
    reference: Graph,
    expected: Sequence[Expected],
    dtype: Precision,
    progress: Progress = silent,
) -> list[Island]:
    """Move what overflows or fails in float16 to float32, in the file.

    Args:
        path: the ONNX file as it was exported, with its weights in ``<path>.data``. Both stay as they are, byte by
            byte, if nothing has to be moved.
        reference: the graph's module in float32.
        expected: cases to judge by. Each costs two runs in ONNX Runtime, of its different samples only where the graph
            leaves their number free.
        dtype: precision of the file: float16.
        progress: told how many of these runs are done.

    Returns:
        The islands in the order of running. If parity still fails after ``ROUNDS`` modules, only those of the range
        pass are made, and the parity gate will refuse the build.

    Raises:
        ExportError: a weight or an output is too large for float16.
    """
    _check_weights(reference)
    model = onnx.load(path, load_external_data=False)
    bounds = list(_bounds(expected, single=takes_any_number(model)))
    step, runs = f"float16 range of {reference.name}", 2 * len(bounds)
    case_list = [replace(one.case, inputs=one.case.spread(one.case.inputs, one.counted)) for one in bounds]
    peaks = measure(model, case_list, path.parent, lambda done: progress(step, done, runs))
    _check_outputs(model, peaks, reference.name)
    moved = out_of_range(model, peaks)
    moved |= _until_parity(
        model, moved, path.parent, reference, bounds, dtype, lambda done: progress(step, len(bounds) + done, runs)
    )
    if moved:
        _save(model, moved, path)
    return _summary(model, moved)


def _bounds(expected: Iterable[Expected], *, single: bool) -> Iterator[Expected]:
    """Yield the cases with the cosine's limit for every output: what else they allow is for engines.

    Args:
        expected: the cases.
        single: whether to take every sample by itself, which needs the least memory.
    """
    for one in expected:
        limited = replace(one, allowed=dict.fromkeys(one.outputs, COSINE_ERROR))
        yield from limited.samples() if single else [limited]


def measure(
    model: onnx.ModelProto, case_list: Sequence[Case], folder: Path, progress: Callable[[int], None] = lambda _: None
) -> dict[str, float]:
    """Return the largest magnitude over all cases of every float16 value of a graph, computed in float32.

    Args:
        model: the graph without its weights, which lie in ``folder``.
        case_list: inputs in float32.
        folder: folder where the weights are.
        progress: told how many cases are done.

    Returns:
        By the value's name; without the values that a node merely passes on.
    """
    lifted = widen(model, range(len(model.graph.node)))
    halves = values_of(model)
    made = {n for node in model.graph.node if node.op_type not in _SAME_VALUES for n in node.output if n in halves}
    only_softmax = _read_by_softmax_only(model)
    peaks, nodes = [], []
    for node in lifted.graph.node:
        nodes.append(node)
        for name in (twin.removesuffix(WIDE) for twin in node.output if twin.endswith(WIDE)):
            if name in made:
                # Two reductions and not one of magnitudes, which would be as large as the value once more.
                nodes += [_reduced(operator, name) for operator in _EXTREMES]
                peaks.append((name, name in only_softmax))
    del lifted.graph.node[:]
    lifted.graph.node.extend(nodes)
    session = open_session(lifted, [f"{name}.{o}" for name, _ in peaks for o in _EXTREMES], folder, frugal=True)
    found = []
    for number, case in enumerate(case_list, start=1):
        found.append(run_session(session, case.inputs))
        progress(number)
    del session
    memory.release()
    high, low = np.array(found, dtype=np.float64).reshape(len(found), -1, 2).transpose(2, 0, 1)
    return {
        name: float((high[:, i] if signed else np.maximum(high[:, i], -low[:, i])).max())
        for i, (name, signed) in enumerate(peaks)
    }


_EXTREMES = ("ReduceMax", "ReduceMin")


def _reduced(operator: str, name: str) -> onnx.NodeProto:
    return helper.make_node(operator, [name + WIDE], [f"{name}.{operator}"], keepdims=0)


def _read_by_softmax_only(model: onnx.ModelProto) -> set[str]:
    """Return values for which minus infinity is no overflow: it is a zero in the Softmax behind."""
    readers: dict[str, set[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    return {name for name, kinds in readers.items() if kinds == {"Softmax"}}


def out_of_range(model: onnx.ModelProto, peaks: Mapping[str, float]) -> dict[int, _Finding]:
    """Return nodes by their index that write or read a value above ``LIMIT``, each with the largest such value.

    Infinity and NaN are not counted: they were computed in float32, which therefore would not help.
    """
    high = {name: peak for name, peak in peaks.items() if LIMIT < peak < math.inf}
    halves = values_of(model)
    found = {}
    for index, node in enumerate(model.graph.node):
        if node.op_type in _SAME_VALUES and (read := [high[name] for name in node.input if name in high]):
            high |= {name: max(read) for name in node.output if name in halves}
        if touched := [name for name in (*node.output, *node.input) if name in high]:
            worst = max(touched, key=lambda name: high[name])
            found[index] = _Finding("overflow", worst, high[worst])
    return found


def _until_parity(
    model: onnx.ModelProto,
    ranged: Mapping[int, _Finding],
    folder: Path,
    reference: Graph,
    expected: Sequence[Expected],
    dtype: Precision,
    progress: Callable[[int], None],
) -> dict[int, _Finding]:
    """Return nodes beyond ``ranged`` that make parity hold, module by module; none if that cannot be reached."""
    extra: dict[int, _Finding] = {}
    for _ in range(ROUNDS + 1):
        moved = {**ranged, **extra}
        candidate = widen(model, moved)
        engine = SimulatedEngine(reference.name, candidate, folder, reference.inputs, reference.outputs, dtype)
        # PyTorch's own error in float16, by which the gate measures, is what is simulated: the cosine's limit is left.
        found = compare(engine, expected, progress)
        engine.close()
        name, worst = min(found.items(), key=lambda item: room(item[1]))
        if worst:
            return extra
        case = next(one.case for one in expected if one.case.name == worst.case)
        layer = bisect.first_bad_module(engine.model, folder, reference, case, COSINE_ERROR) or ""
        logger.warning("%s.%s: error %.3g in float16, first in %r", reference.name, name, worst.error, layer)
        nodes = _nodes_to_move(model, layer, moved)
        if not nodes:
            break
        extra |= dict.fromkeys(nodes, _Finding("parity", name, worst.error))
    logger.warning("%s: float32 islands do not bring parity; only overflows are mended", reference.name)
    return {}


def _nodes_to_move(model: onnx.ModelProto, layer: str, moved: Collection[int]) -> list[int]:
    """List nodes of a module, or of the smallest one around it short of the whole model that has any left to move."""
    found: list[int] = []
    while "." in layer and not found:
        found = [i for i, node in enumerate(model.graph.node) if layer in bisect.scopes(node) and i not in moved]
        layer = layer.rpartition(".")[0]
    return found


def _save(model: onnx.ModelProto, moved: Collection[int], path: Path) -> None:
    """Replace ``path`` and its weights by the graph with its islands, laid out like the exporter's files."""
    changed = widen(model, moved)
    widen_weights(changed, path.parent)
    packed = onnx_ir.from_proto(changed)
    onnx_ir.external_data.set_base_dir(packed.graph, path.parent)
    with tempfile.TemporaryDirectory(
        dir=path.parent
    ) as scratch:  # the old weights are read while new ones are written
        onnx_ir.save(packed, Path(scratch) / path.name, external_data=f"{path.name}.data")
        for file in Path(scratch).iterdir():
            file.replace(path.parent / file.name)


def _check_weights(reference: Graph) -> None:
    lost = [n for n, p in reference.module.named_parameters() if LARGEST < float(p.detach().abs().max()) < math.inf]
    if lost:
        raise ExportError(
            f"The graph {reference.name!r} has weights above {LARGEST:.0f}, which float16 cannot hold: "
            f"{', '.join(lost)}. Build with --dtype bf16 or fp32."
        )


def _check_outputs(model: onnx.ModelProto, peaks: Mapping[str, float], name: str) -> None:
    lost = [f"{o.name} ({peaks[o.name]:.3g})" for o in model.graph.output if LARGEST < peaks.get(o.name, 0) < math.inf]
    if lost:
        raise ExportError(
            f"Outputs of the graph {name!r} exceed {LARGEST:.0f}, which float16 cannot hold: {', '.join(lost)}. Build "
            "with --dtype bf16 or fp32."
        )


def _summary(model: onnx.ModelProto, moved: Mapping[int, _Finding]) -> list[Island]:
    """Return one island for each innermost module and reason, with the largest of what was measured."""
    groups: dict[tuple[str, str], list[_Finding]] = {}
    for index in sorted(moved):
        scope = "".join(bisect.scopes(model.graph.node[index])[-1:])
        groups.setdefault((scope, moved[index].reason), []).append(moved[index])
    islands = []
    for (scope, reason), findings in groups.items():
        worst = max(findings, key=lambda finding: finding.measured)
        measured = float(f"{worst.measured:.3g}") if math.isfinite(worst.measured) else None
        islands.append(Island(scope, worst.tensor, reason, measured, len(findings)))
    return islands
