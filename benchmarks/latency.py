"""Latency of a bundle beside diffusers: the same code as ``icexport bench``, for scripts and machines without the CLI.

python -m benchmarks.latency builds/canny --steps 20 --iterations 5 --output benchmarks/results/cpu/latency
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from icexport.bench.latency import run_latency


def main() -> None:
    """Command line of ``python -m benchmarks.latency``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", action="append", help="repeatable; default: all of the bundle")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="writes OUTPUT.json, OUTPUT.md and OUTPUT.png")
    args = parser.parse_args()
    report = run_latency(
        args.bundle,
        backends=args.backend,
        steps=args.steps,
        warmup=args.warmup,
        iterations=args.iterations,
        batch=args.batch,
        device=args.device,
        progress=lambda text: print(text, file=sys.stderr),  # noqa: T201
    )
    if args.output:
        report.save(args.output)
    sys.stdout.write(report.to_markdown())


if __name__ == "__main__":
    main()
