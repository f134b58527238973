"""The parity gate: every engine of a bundle against PyTorch in float32."""

from __future__ import annotations

import functools
import gc
import json
import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
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
from icexport.graphs.split import split
from icexport.models.loading import ModelSource
from icexport.models.precision import REFERENCE, precision
from icexport.models.sizes import size_multiple
from icexport.parity.bisect import first_bad_layer
from icexport.parity.cases import Case, cases
from icexport.parity.compare import COSINE_ERROR, MIN_COSINE, OutputParity, compare, room
from icexport.parity.simulation import SimulatedEngine
from icexport.progress import Progress

logger = logging.getLogger(__name__)


SIMULATION = "simulation"
"""In the results of the gate: the graph with every value rounded, for plans that cannot run where the gate runs."""


PLUGIN_GRAPH = "plugin graph"
"""In the results of the gate: the graph whose nodes are plugins, run without them."""


def parity_gate(
    bundle: Bundle,
    source: ModelSource,
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
        backends: names of the backends to check.
        progress: told which graph is being checked.
        device: where the engines run; None: each backend's default.

    Raises:
        ParityError: an output failed; each one, the worst case and the first layer that went wrong are named.
    """
    manifest = bundle.manifest
    dtype, multiple = precision(manifest.dtype), size_multiple(manifest.configs["unet"], manifest.configs["vae"])
    runnable = _runnable(bundle, backends, device)
    results: Parity = {name: {} for name in dict.fromkeys((*backends, *runnable))}
    failures = []
    for graph in split(source, REFERENCE.torch):
        progress(f"parity {graph.name}")
        reference = graph.engine()
        own = graph.cast(dtype.torch).engine() if dtype.reduced else None
        case_list = list(cases(graph, manifest.profile, multiple))
        engines = dict(runnable)
        if bundle.graph(graph.name).plugin_file is not None:
            engines[PLUGIN_GRAPH] = functools.partial(_inlined, bundle)
            results.setdefault(PLUGIN_GRAPH, {})
        for backend in engines:
            engine = engines[backend](graph.name)
            found = compare(engine, reference, own, case_list, dtype)
            engine.close()
            results[backend][graph.name] = {name: _result(output) for name, output in found.items()}
            if not all(found.values()):
                failures.append(_explain(bundle, graph, backend, found, case_list))
        del graph, reference, own
        gc.collect()
    if failures:
        raise ParityError("Parity failed. " + " ".join(failures), parity_json(results))
    return results


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


def _explain(
    bundle: Bundle,
    graph: Graph,
    backend: str,
    found: Mapping[str, OutputParity],
    case_list: list[Case],
) -> str:
    bad = {name: output for name, output in found.items() if not output}
    text = "; ".join(
        f"{graph.name}.{name} on {backend}: cosine {output.cosine:.6f} (at least {MIN_COSINE}), relative error "
        f"{output.error:.2e} (at most {output.allowed:.2e}){'' if output.finite else ', NaN, infinite or missing'}, "
        f"worst at {output.case}"
        for name, output in bad.items()
    )
    if backend == "onnxruntime":
        worst = min(bad.values(), key=room)
        case = next(c for c in case_list if c.name == worst.case)
        layer = first_bad_layer(bundle.onnx(graph.name), graph, case, min(worst.allowed, COSINE_ERROR))
        text += f". First layer that differs: {layer}" if layer else ". No single layer differs by more than that"
    return f"{text}."


def write_report(bundle: Bundle, results: Parity) -> None:
    """Write ``reports/parity.json``."""
    path = bundle.path / "reports" / "parity.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(parity_json(results), indent=2) + "\n", encoding="utf-8")
