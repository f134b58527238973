"""A bundle in a few lines: what build, verify and inspect tell of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icexport.bundle.records import Parity, ParityResult
    from icexport.bundle.store import Bundle


def graph_rows(bundle: Bundle) -> list[dict[str, Any]]:
    """Return the name, size in MB with weights, and what the weights are, of each graph."""
    rows = []
    for name, entry in bundle.manifest.graphs.items():
        files = [bundle.path / f for f in bundle.manifest.files if f in (entry.file, f"{entry.file}.data")]
        size = sum(file.stat().st_size for file in files)
        inputs, outputs = ([tensor.name for tensor in side] for side in (entry.inputs, entry.outputs))
        weights = {
            kind: count for kind, count in entry.dtypes.items() if kind.startswith(("float", "double", "bfloat"))
        }
        rows.append({"graph": name, "MB": size / 1e6, "inputs": inputs, "outputs": outputs, "weights": weights})
    return rows


def parity_rows(results: Parity) -> list[dict[str, Any]]:
    """Return the worst output of each graph on each backend, from the results of the parity gate.

    A backend whose engines could not run where the gate ran has one row, with ``passed`` None.
    """
    rows: list[dict[str, Any]] = []
    for backend, graphs in results.items():
        if not graphs:
            columns = ("worst_output", "relative_error", "allowed_error", "cosine", "passed")
            rows.append({"backend": backend, "graph": "not run: no device", **dict.fromkeys(columns)})
        for graph, outputs in graphs.items():
            name, worst = max(outputs.items(), key=lambda item: (not item[1].passed, _error(item[1])))
            rows.append(
                {
                    "backend": backend,
                    "graph": graph,
                    "worst_output": name,
                    "relative_error": worst.relative_error,
                    "allowed_error": worst.allowed_error,
                    "cosine": min(output.cosine for output in outputs.values()),
                    "passed": all(output.passed for output in outputs.values()),
                }
            )
    return rows


def _error(output: ParityResult) -> float:
    return math.inf if output.relative_error is None else output.relative_error


def engine_rows(bundle: Bundle) -> list[dict[str, Any]]:
    """Return what each engine is, what it was built for, and what the builder told of it."""
    return [
        {
            "backend": entry.backend,
            "graph": entry.graph,
            "version": entry.version,
            "device": entry.device,
            "precision": entry.report.get("precision", {}),
            "read_from": entry.report.get("read_from"),
            "plugins": entry.report.get("plugins", []),
            "MB": sum((bundle.path / file).stat().st_size for file in entry.files) / 1e6,
            "seconds": entry.report.get("build_seconds"),
            "key": key,
        }
        for key, entry in bundle.manifest.engines.items()
    ]
