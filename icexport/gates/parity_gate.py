"""The parity gate: every engine of a bundle against PyTorch in float32."""

from __future__ import annotations

import functools
import gc
import json
import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from engines.base import Engine
from engines.onnxruntime import OnnxRuntimeEngine
from icexport.backends import table
from icexport.backends.engines import load_engine
from icexport.bundle.records import Parity, ParityResult, parity_json
from icexport.bundle.store import Bundle
from icexport.errors import ParityError
from icexport.export.plugins import inline_plugins
from icexport.graphs.graph import Graph, specs
from icexport.graphs.profile import Profile
from icexport.graphs.split import split
from icexport.host import memory
from icexport.models.precision import REFERENCE, Precision, precision
from icexport.models.sizes import size_multiple
from icexport.models.source import ModelSource
from icexport.parity.bisect import first_bad_module
from icexport.parity.cases import cases
from icexport.parity.compare import COSINE_ERROR, MIN_COSINE, Expected, OutputParity, compare, expect, room
from icexport.parity.session import takes_any_number
from icexport.parity.simulation import SimulatedEngine
from icexport.progress import Progress

logger = logging.getLogger(__name__)


SIMULATION = "simulation"
"""In the results of the gate: the graph with every value rounded, for plans that cannot run where the gate runs."""


PLUGIN_GRAPH = "plugin graph"
"""In the results of the gate: the graph whose nodes are plugins, run without them."""


def expected_of(
    source: ModelSource, dtype: Precision, profile: Profile, progress: Progress
) -> dict[str, list[Expected]]:
    """Return what every graph of a model has to compute; none of its weights stays in memory.

    Args:
        source: the model.
        dtype: precision of the engines that are to be judged.
        profile: sizes of the bundle.
        progress: told which graph is being computed.
    """
    multiple = size_multiple(source.config("unet"), source.config("vae"))
    found = {}
    for graph in split(source, REFERENCE.torch, profile):
        lowered = graph.cast(dtype.torch) if dtype.reduced else None
        found[graph.name] = expect_graph(graph, lowered, dtype, profile, multiple, progress)
        del graph, lowered
        gc.collect()
    return found


def expect_graph(
    graph: Graph,
    lowered: Graph | None,
    dtype: Precision,
    profile: Profile,
    multiple: int,
    progress: Progress,
) -> list[Expected]:
    """Return what the engines of one graph have to compute.

    Args:
        graph: the graph in float32.
        lowered: the graph in the precision of the engines; None where that is float32, too.
        dtype: precision of the engines.
        profile: sizes of the bundle.
        multiple: pixels of one step of the symbols ``rows`` and ``columns``.
        progress: told how many cases are done.
    """
    step, case_list = f"reference {graph.name}", list(cases(graph, profile, multiple))
    progress(step)
    found = []
    for one in expect(case_list, graph.engine(), lowered.engine() if lowered is not None else None, dtype):
        found.append(one)
        progress(step, len(found), len(case_list))
    return found


def parity_gate(
    bundle: Bundle,
    source: ModelSource,
    expected: Mapping[str, Sequence[Expected]],
    backends: Sequence[str],
    progress: Progress,
    device: str | None = None,
) -> Parity:
    """Compare every graph of every backend with PyTorch in float32; see ``icexport.parity.compare``.

    Plans for a device that this machine does not have cannot run here. Their own results stay empty, and the graphs
    that they were built from are checked instead, in float16 and bfloat16 with every value rounded as a GPU does.

    Args:
        bundle: the bundle.
        source: the model that the bundle was made from.
        expected: what each graph has to compute, in the order of checking; see ``expected_of``.
        backends: names of the backends to check.
        progress: told which graph is being checked.
        device: where the engines run; None: each backend's default.

    Raises:
        ParityError: an output failed; each one, the worst case and the first layer that went wrong are named.
    """
    runnable = _runnable(bundle, backends, device)
    results: Parity = {name: {} for name in dict.fromkeys((*backends, *runnable))}
    failures = []
    for graph, wanted in expected.items():
        engines = dict(runnable)
        if bundle.graph(graph).plugin_file is not None:
            engines[PLUGIN_GRAPH] = functools.partial(_inlined, bundle)
            results.setdefault(PLUGIN_GRAPH, {})
        progress(f"parity {graph}")
        for index, (backend, load) in enumerate(engines.items()):
            engine = load(graph)
            tell = functools.partial(
                _tell, progress, f"parity {graph}", index * len(wanted), len(engines) * len(wanted)
            )
            found = compare(engine, wanted, tell)
            path = engine.path if isinstance(engine, OnnxRuntimeEngine) else None
            engine.close()
            del engine
            memory.release()
            results[backend][graph] = {name: _result(output) for name, output in found.items()}
            if not all(found.values()):
                failures.append(_Failure(graph, backend, found, path))
    if failures:
        texts = [_explain(bundle, source, failure, expected[failure.graph]) for failure in failures]
        raise ParityError("Parity failed. " + " ".join(texts), parity_json(results))
    return results


def _tell(progress: Progress, step: str, before: int, total: int, done: int) -> None:
    progress(step, before + done, total)


@dataclass(frozen=True)
class _Failure:
    """Outputs of one graph on one backend, some of them wrong; and the ONNX file that ran, if one did."""

    graph: str
    backend: str
    found: dict[str, OutputParity]
    path: Path | None


def _result(output: OutputParity) -> ParityResult:
    return ParityResult(
        passed=bool(output),
        cosine=round(output.cosine, 9),
        relative_error=_short(output.error),
        allowed_error=_short(output.allowed),
        worst_case=output.case,
        finite=output.finite,
    )


def _short(value: float) -> float | None:
    """Return four digits; None for infinity, which JSON does not have."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _inlined(bundle: Bundle, graph: str) -> Engine:
    """Return the graph with plugins as nodes, each replaced by its definition in plain ONNX."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{graph}.onnx"
        onnx.save(inline_plugins(onnx.load(bundle.onnx(graph, plugins=True))), path)
        return OnnxRuntimeEngine(graph, path)


def _runnable(bundle: Bundle, backends: Sequence[str], device: str | None) -> dict[str, Callable[[str], Engine]]:
    """Return what makes the engine of a graph, for each backend that runs here."""
    found: dict[str, Callable[[str], Engine]] = {}
    for name in backends:
        state = table.get(name).check()
        if state.usable:
            found[name] = functools.partial(load_engine, bundle, backend=name, device=device)
            continue
        logger.warning(
            "The %s plans cannot run here (%s): their parity is not known. Run on the target: icexport verify BUNDLE",
            name,
            state.reason,
        )
        if not precision(bundle.manifest.dtype).reduced:
            found.setdefault("onnxruntime", lambda graph: OnnxRuntimeEngine(graph, bundle.onnx(graph)))
        else:
            found[SIMULATION] = functools.partial(simulated, bundle)
    return found


def simulated(bundle: Bundle, graph: str) -> Engine:
    """Return the graph with every value rounded, which ONNX Runtime on a CPU does not do by itself."""
    entry, path = bundle.graph(graph), bundle.onnx(graph)
    model = onnx.load(path, load_external_data=False)
    inputs, outputs = specs(entry.inputs), specs(entry.outputs)
    return SimulatedEngine(graph, model, path.parent, inputs, outputs, precision(bundle.manifest.dtype))


def _explain(bundle: Bundle, source: ModelSource, failure: _Failure, expected: Sequence[Expected]) -> str:
    graph, bad = failure.graph, {name: output for name, output in failure.found.items() if not output}
    text = "; ".join(
        f"{graph}.{name} on {failure.backend}: cosine {output.cosine:.6f} (at least {MIN_COSINE}), relative error "
        f"{output.error:.2e} (at most {output.allowed:.2e}){'' if output.finite else ', NaN, infinite or missing'}, "
        f"worst at {output.case}"
        for name, output in bad.items()
    )
    if failure.path is not None and failure.backend != PLUGIN_GRAPH:
        worst = min(bad.values(), key=room)
        one = next(one for one in expected if one.case.name == worst.case)
        ran = onnx.load(failure.path, load_external_data=False)
        weights = bundle.onnx(graph).parent
        layer = _first_bad_layer(ran, weights, _reference_graph(source, graph), one, min(worst.allowed, COSINE_ERROR))
        text += f". First layer that differs: {layer}" if layer else ". No single layer differs by more than that"
    return f"{text}."


def _first_bad_layer(model: onnx.ModelProto, weights: Path, graph: Graph, one: Expected, allowed: float) -> str | None:
    """Bisect what ran; with the different samples first, since all rows may need much memory."""
    spread = one.case.spread(one.case.inputs, one.counted)
    tries = [one.case.inputs, spread] if one.case.rows and takes_any_number(model) else [spread]
    layers = (
        first_bad_module(model, weights, graph, replace(one.case, inputs=inputs, rows=()), allowed) for inputs in tries
    )
    return next((layer for layer in layers if layer), None)


def _reference_graph(source: ModelSource, name: str) -> Graph:
    """Return one graph of a model in float32; those before it are loaded on the way."""
    return next(graph for graph in split(source, REFERENCE.torch) if graph.name == name)


def write_report(bundle: Bundle, results: Parity) -> None:
    """Write ``reports/parity.json``."""
    path = bundle.path / "reports" / "parity.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(parity_json(results), indent=2) + "\n", encoding="utf-8")
