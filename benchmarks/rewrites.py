"""What a bundle's rewritten graphs gain over the plain ones in ONNX Runtime, call by call in turn.

    python -m benchmarks.rewrites BUNDLE

A row for each graph that the build has rewritten: milliseconds of a guided call at the bundle's usual size (medians),
the plain graph's over the rewritten one's, and the largest relative difference of an output (RMS). The last line on
stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from engines.base import Engine
from engines.onnxruntime import OnnxRuntimeEngine
from icexport.backends.engines import load_engine
from icexport.bundle.store import Bundle
from icexport.graphs.graph import example_inputs, specs
from icexport.host.versions import machine
from icexport.models.sizes import size_multiple
from icexport.parity.compare import relative_error


def compared(bundle: Bundle, rounds: int) -> list[dict[str, Any]]:
    """Return one row for each rewritten graph.

    Args:
        bundle: a bundle for ONNX Runtime.
        rounds: calls of each of the two; one more before them is not counted.
    """
    manifest, rows = bundle.manifest, []
    multiple = size_multiple(manifest.configs["unet"], manifest.configs["vae"])
    sizes = {name: size.opt for name, size in manifest.profile.symbols(multiple).items()}
    for name, entry in manifest.graphs.items():
        engine = load_engine(bundle, name, backend="onnxruntime", device="cpu")
        path = bundle.onnx(name)
        if not isinstance(engine, OnnxRuntimeEngine) or engine.path == path:
            continue
        plain = OnnxRuntimeEngine(name, path)
        inputs = example_inputs(specs(entry.inputs), sizes)
        expected, found = plain(inputs), engine(inputs)
        pairs = [(_milliseconds(plain, inputs), _milliseconds(engine, inputs)) for _ in range(rounds)]
        before, after = (statistics.median(column) for column in zip(*pairs, strict=True))
        rows.append(
            {
                "graph": name,
                "plain ms": round(before, 2),
                "rewritten ms": round(after, 2),
                "gain": round(before / after, 3),
                "difference": max(relative_error(found[output], expected[output]) for output in expected),
            }
        )
        plain.close()
        engine.close()
    return rows


def _milliseconds(engine: Engine, inputs: Mapping[str, Tensor]) -> float:
    started = time.perf_counter()
    engine(inputs)
    return 1e3 * (time.perf_counter() - started)


def main() -> None:
    """Run the command line of ``python -m benchmarks.rewrites``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=30, help="calls of each graph (default 30)")
    args = parser.parse_args()
    rows = compared(Bundle(args.bundle), args.rounds)
    for row in rows:
        sys.stdout.write(
            f"{row['graph']:12} {row['plain ms']:9.2f} {row['rewritten ms']:9.2f} {row['gain']:6.2f}x "
            f"{row['difference']:.1e}\n"
        )
    sys.stdout.write(json.dumps({"machine": machine(), "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
