"""Time and memory of building TensorRT-RTX plans of Stable Diffusion 1.5's true architecture, with random weights.

    python -m benchmarks.plan_size --graph unet --target-sm 86 89 120

Needs no GPU. The plan is built in a process of its own, whose peak is the builder's. The last line on stdout is one
JSON document.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.sd15 import GRAPHS, VAE_CONFIG, sd15_graph, sd15_unet_config
from engines.tensorrt.plan import PlanRequest
from engines.tensorrt.worker import build
from icexport.backends.plans import optimisation_profiles
from icexport.export import DEFAULT_OPSET
from icexport.export.onnx import export_graph
from icexport.graphs.graph import describe
from icexport.graphs.profile import Profile, SizeRange
from icexport.models.precision import precision
from icexport.models.sizes import size_multiple


def measure(name: str, dtype: str, opset: int, targets: tuple[int, ...]) -> dict[str, Any]:
    """Export one graph for one picture of 512 x 512 px, build its plan, and report what the builder told."""
    side = SizeRange(512, 512, 512)
    profile = Profile(SizeRange(1, 1, 1), side, side)
    multiple = size_multiple(sd15_unet_config(), VAE_CONFIG)
    with tempfile.TemporaryDirectory() as folder:
        onnx, plan = Path(folder) / f"{name}.onnx", Path(folder) / f"{name}.plan"
        graph = sd15_graph(name, precision(dtype).torch)
        inputs = graph.inputs
        export_graph(graph, onnx, profile.symbols(multiple), opset)
        del graph
        gc.collect()
        profiles = tuple(optimisation_profiles(describe(inputs), profile, multiple))
        report = build(PlanRequest("tensorrt-rtx", onnx, plan, dtype, profiles, targets))
    return {"graph": name, "dtype": dtype, "opset": opset, "profiles": len(profiles), **report.as_json()}


def main() -> None:
    """Run the command line of ``python -m benchmarks.plan_size``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", choices=GRAPHS, required=True)
    parser.add_argument("--dtype", choices=("fp32", "fp16"), default="fp16")
    parser.add_argument("--opset", type=int, default=DEFAULT_OPSET)
    parser.add_argument("--target-sm", type=int, nargs="+", default=(86, 89, 120))
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    found = measure(args.graph, args.dtype, args.opset, tuple(args.target_sm))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
