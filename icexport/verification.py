"""``icexport verify`` and the last step of ``build``: the parity gate over a bundle's engines."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engines.torch_eager import TorchEngine
from icexport.build_spec import BuildSpec, graphs
from icexport.bundle.engines import choose_backend, load_engine
from icexport.bundle.store import Bundle
from icexport.errors import CheckpointError, ParityError
from icexport.fidelity import parity
from icexport.fidelity.bisect import first_bad_layer
from icexport.models.graphs import Graph
from icexport.models.loading import ModelSource
from icexport.models.sizes import size_multiple

logger = logging.getLogger(__name__)


def verify(
    bundle: Bundle | str,
    *,
    backend: str | Sequence[str] | None = None,
    model: str | None = None,
    progress: Callable[[str], None] = lambda _step: None,
) -> dict[str, Any]:
    """Check every file's hash, then every engine against the model that the bundle was made from.

    Args:
        bundle: a bundle or its folder.
        backend: one or more names of backends; default: all that the bundle was built for.
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
    built = tuple(dict.fromkeys(e.backend for e in bundle.manifest.engines.values()))
    names = (backend,) if isinstance(backend, str) else tuple(backend or built)
    backends = tuple(dict.fromkeys(choose_backend(bundle, name, "cpu") for name in names))
    spec = BuildSpec(source, backends, bundle.manifest.dtype, bundle.manifest.opset, bundle.manifest.profile, True)
    return parity_gate(bundle, spec, progress)


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


def parity_gate(bundle: Bundle, spec: BuildSpec, progress: Callable[[str], None]) -> dict[str, Any]:
    """Compare every graph of every backend with PyTorch in float32; see ``icexport.fidelity.parity``.

    Raises:
        ParityError: naming each failed output, the worst case, and the first layer that went wrong.
    """
    multiple = size_multiple(bundle.manifest.configs["unet"], bundle.manifest.configs["vae"])
    results: dict[str, Any] = {name: {} for name in spec.backends}
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
        for backend in spec.backends:
            engine = load_engine(bundle, graph.name, backend)
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
        layer = first_bad_layer(bundle.onnx(graph.name), graph, case, worst.allowed)
        text += f". First layer that differs: {layer}" if layer else ". No single layer differs by more than that"
    return f"{text}."


def write_report(bundle: Bundle, results: dict[str, Any]) -> None:
    """``reports/parity.json``."""
    path = bundle.path / "reports" / "parity.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
