"""``icexport verify`` and the last step of ``build``: the parity gate over a bundle's engines."""

from __future__ import annotations

import functools
import gc
import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from engines import registry
from engines.base import Engine
from engines.onnxruntime import OnnxRuntimeEngine
from engines.torch_eager import TorchEngine
from icexport.build_spec import BuildSpec, graphs
from icexport.bundle.engines import built_backends, choose_backend, default_device, load_engine, specs
from icexport.bundle.store import Bundle
from icexport.errors import CheckpointError, ParityError
from icexport.export.plugins import inline_plugins
from icexport.fidelity import parity
from icexport.fidelity.bisect import first_bad_layer
from icexport.fidelity.simulation import SimulatedEngine
from icexport.models.graphs import Graph
from icexport.models.loading import ModelSource
from icexport.models.sizes import size_multiple

logger = logging.getLogger(__name__)

SIMULATION = "simulation"
"""In the results of the gate: the graph with every value rounded, for plans that cannot run where the gate runs."""
PLUGIN_GRAPH = "plugin graph"
"""In the results of the gate: the graph whose nodes are plugins, run without them."""


def verify(
    bundle: Bundle | str,
    *,
    backend: str | Sequence[str] | None = None,
    device: str | None = None,
    model: str | None = None,
    progress: Callable[[str], None] = lambda _step: None,
) -> dict[str, Any]:
    """Check every file's hash, then every engine against the model that the bundle was made from.

    Args:
        bundle: a bundle or its folder.
        backend: one or more names of backends; default: all that the bundle was built for.
        device: where the engines run, ``cpu``, ``cuda`` or ``cuda:<i>``; default: ``cuda`` for a backend that runs
            nowhere else, else ``cpu``. What they are compared with is always computed on the CPU.
        model: where the base model lies now, if it has moved.
        progress: called with a short text when a step begins.

    Returns:
        Results by backend, graph and output, as in ``reports/parity.json``.

    Raises:
        DamagedBundleError: a file was changed.
        CheckpointError: the model is not the one that the bundle was made from.
        ParityError: an engine does not match; the results are its ``results``.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    progress("check the files")
    bundle.verify()
    source = recorded_source(bundle, model)
    names = (backend,) if isinstance(backend, str) else tuple(backend or built_backends(bundle))
    chosen = [choose_backend(bundle, name, device or default_device(bundle, name)) for name in names]
    backends = tuple(dict.fromkeys(chosen))
    spec = BuildSpec(source, backends, bundle.manifest.dtype, bundle.manifest.opset, bundle.manifest.profile, True)
    return parity_gate(bundle, spec, progress, device)


def recorded_source(bundle: Bundle, model: str | None = None) -> ModelSource:
    """The model that a bundle was made from, with every file compared.

    Args:
        bundle: the bundle.
        model: where the base model lies now, if it has moved.

    Raises:
        CheckpointError: it is not there any more, or was changed.
    """
    recorded = bundle.manifest.source
    source = ModelSource.find(
        bundle.manifest.condition["name"], model or recorded["model"], recorded["controlnet"], recorded["probe"]
    )
    changed = sorted(n for n in {*source.files, *recorded["files"]} if source.files.get(n) != recorded["files"].get(n))
    if changed:
        raise CheckpointError(
            f"The model at {source.base} is not the one that {bundle.path} was made from; different: "
            f"{', '.join(changed)}. Give the right one with --model, or build again."
        )
    return source


def parity_gate(
    bundle: Bundle, spec: BuildSpec, progress: Callable[[str], None], device: str | None = None
) -> dict[str, Any]:
    """Compare every graph of every backend with PyTorch in float32; see ``icexport.fidelity.parity``.

    Plans for a device that this machine does not have cannot run here. Their own results stay empty, and the graphs
    that they were built from are checked instead, in float16 and bfloat16 with every value rounded as a GPU does.

    Raises:
        ParityError: naming each failed output, the worst case, and the first layer that went wrong.
    """
    multiple = size_multiple(bundle.manifest.configs["unet"], bundle.manifest.configs["vae"])
    backends = _runnable(bundle, spec, device)
    results: dict[str, Any] = {name: {} for name in dict.fromkeys((*spec.backends, *backends))}
    failures = []
    own_precision = graphs(spec, spec.dtype) if spec.dtype != "fp32" else None
    for graph in graphs(spec, "fp32"):
        progress(f"parity {graph.name}")
        reference = TorchEngine(graph.name, graph.module, graph.inputs, graph.outputs)
        own = None
        if own_precision is not None:
            half = next(own_precision)
            own = TorchEngine(half.name, half.module, half.inputs, half.outputs)
        case_list = list(parity.cases(graph, spec.profile, multiple))
        engines = dict(backends)
        if bundle.graph(graph.name).plugin_file is not None:
            engines[PLUGIN_GRAPH] = functools.partial(_inlined, bundle)
            results.setdefault(PLUGIN_GRAPH, {})
        for backend in engines:
            engine = engines[backend](graph.name)
            found = parity.compare(engine, reference, own, case_list, spec.dtype)
            engine.close()
            results[backend][graph.name] = {name: output.to_json() for name, output in found.items()}
            if not all(found.values()):
                failures.append(_explain(bundle, graph, backend, found, case_list))
        del graph, reference, own
        gc.collect()
    if failures:
        raise ParityError("Parity failed. " + " ".join(failures), results)
    return results


def _inlined(bundle: Bundle, graph: str) -> Engine:
    """The graph with plugins as nodes, each replaced by its definition in plain ONNX."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{graph}.onnx"
        onnx.save(inline_plugins(onnx.load(bundle.onnx(graph, plugins=True))), path)
        return OnnxRuntimeEngine(graph, path)


def _runnable(bundle: Bundle, spec: BuildSpec, device: str | None) -> dict[str, Callable[[str], Engine]]:
    """What makes the engine of a graph, for each backend that runs here."""
    found: dict[str, Callable[[str], Engine]] = {}
    for name in spec.backends:
        state = registry.check(name)
        if state.usable:
            found[name] = functools.partial(load_engine, bundle, backend=name, device=device)
            continue
        logger.warning(
            "The %s plans cannot run here (%s): their parity is not known. Run on the target: icexport verify BUNDLE",
            name,
            state.reason,
        )
        if spec.dtype == "fp32":
            found.setdefault("onnxruntime", lambda graph: OnnxRuntimeEngine(graph, bundle.onnx(graph)))
        else:
            found[SIMULATION] = functools.partial(simulated, bundle)
    return found


def simulated(bundle: Bundle, graph: str) -> Engine:
    """The graph with every value rounded, which ONNX Runtime on a CPU does not do by itself."""
    entry, path = bundle.graph(graph), bundle.onnx(graph)
    model = onnx.load(path, load_external_data=False)
    inputs, outputs = specs(entry.inputs), specs(entry.outputs)
    return SimulatedEngine(graph, model, path.parent, inputs, outputs, bundle.manifest.dtype)


def _explain(
    bundle: Bundle,
    graph: Graph,
    backend: str,
    found: Mapping[str, parity.OutputParity],
    case_list: list[parity.Case],
) -> str:
    bad = {name: output for name, output in found.items() if not output}
    text = "; ".join(
        f"{graph.name}.{name} on {backend}: cosine {output.cosine:.6f} (at least {parity.MIN_COSINE}), relative error "
        f"{output.error:.2e} (at most {output.allowed:.2e}){'' if output.finite else ', NaN, infinite or missing'}, "
        f"worst at {output.case}"
        for name, output in bad.items()
    )
    if backend == "onnxruntime":
        worst = min(bad.values(), key=parity.room)
        case = next(c for c in case_list if c.name == worst.case)
        layer = first_bad_layer(bundle.onnx(graph.name), graph, case, min(worst.allowed, parity.COSINE_ERROR))
        text += f". First layer that differs: {layer}" if layer else ". No single layer differs by more than that"
    return f"{text}."


def write_report(bundle: Bundle, results: dict[str, Any]) -> None:
    """``reports/parity.json``."""
    path = bundle.path / "reports" / "parity.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
