"""Time and memory of exporting Stable Diffusion 1.5's true architecture, with random weights.

    python -m benchmarks.export_size --graph unet --dtype fp32

One graph per process, so that the peak is this graph's. The last line on stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
import torch

from benchmarks.sd15 import GRAPHS, VAE_CONFIG, sd15_graph, sd15_unet_config
from icexport.export import DEFAULT_OPSET
from icexport.export.onnx import export_graph
from icexport.export.precision import read_precision
from icexport.graphs.profile import Profile, SizeRange
from icexport.models.precision import precision
from icexport.models.sizes import size_multiple


def peak_bytes() -> int:
    """Return the largest resident size of this process since the last ``forget_peak``; Linux only."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))


def forget_peak() -> None:
    """Begin a new peak at the present size: making the random weights needs more memory than they do afterwards."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def measure(name: str, dtype: str, opset: int, dynamic: bool) -> dict[str, Any]:
    """Export one graph into a temporary folder and report seconds, bytes and operators."""
    libraries = peak_bytes()
    graph = sd15_graph(name, precision(dtype).torch)
    forget_peak()
    loaded = peak_bytes()
    weights = sum(p.numel() * p.element_size() for p in graph.module.parameters())
    side = SizeRange(512, 512, 768) if dynamic else SizeRange(512, 512, 512)
    symbols = Profile(SizeRange(1, 1, 4), side, side).symbols(size_multiple(sd15_unet_config(), VAE_CONFIG))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.onnx"
        started = time.perf_counter()
        export_graph(graph, path, symbols, opset)
        seconds = time.perf_counter() - started
        elements = read_precision(path, precision(dtype))
        model = onnx.load(path, load_external_data=False)
        sizes = {p.name: p.stat().st_size for p in Path(folder).iterdir()}
    operators = [node.op_type for node in model.graph.node]
    return {
        "graph": name,
        "dtype": dtype,
        "opset": opset,
        "dynamic_size": dynamic,
        "seconds": round(seconds, 1),
        "weight_bytes": weights,
        "library_bytes": libraries,
        "loaded_bytes": loaded,
        "peak_bytes": peak_bytes(),
        "files": sizes,
        "elements": elements,
        "nodes": len(operators),
        "group_norms": operators.count("GroupNormalization"),
        "attention": operators.count("Attention"),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }


def main() -> None:
    """Run the command line of ``python -m benchmarks.export_size``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", choices=GRAPHS, required=True)
    parser.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32")
    parser.add_argument("--opset", type=int, default=DEFAULT_OPSET)
    parser.add_argument("--dynamic", action="store_true", help="free height and width, 512 to 768 px")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    sys.stdout.write(json.dumps(measure(args.graph, args.dtype, args.opset, args.dynamic)) + "\n")


if __name__ == "__main__":
    main()
