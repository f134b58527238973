"""Microseconds, GB/s and shares of the measured ceilings of the probe's kernels, beside torch and the official head.

    python -m benchmarks.kernels --output benchmarks/results/kernels   # times, on a GPU
    python -m benchmarks.kernels --tune                                # writes engines/kernels/tuning/<op>.json
    python -m benchmarks.kernels --predict h200                        # no GPU: what the times should be

Times are of CUDA graphs; those of the head also of launches from Python.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.gpu import measure, prediction, tune
from benchmarks.gpu.machine import ROOT
from benchmarks.gpu.timing import Bench, Row, ceilings
from engines.kernels import SPECS

RESULTS = ROOT / "benchmarks" / "results"
_NO_GPU = 2


def run(bench: Bench) -> Iterator[Row]:
    """Measure everything, one row after the other."""
    limits = ceilings(bench)
    yield from measure.ceiling_rows(bench, limits)
    with torch.no_grad():
        for spec, case in measure.kernel_cases(bench):
            calls = measure.kernel_calls(spec, case, bench)
            if bench.cuda:
                calls["torch.compile"] = measure.compiled_call(spec, case, bench)
            for provider, call in calls.items():
                yield from measure.kernel_rows(spec, case, provider, call, bench, limits)
        for _, timed in measure.head_rows(bench):
            yield timed()


def write_prediction(name: str, folder: Path) -> list[Path]:
    """Write ``prediction-<name>.json`` and ``.md``; return the files."""
    found = prediction.predict(prediction.DEVICES[name])
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"prediction-{name}.{suffix}" for suffix in ("json", "md")]
    paths[0].write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    paths[1].write_text(prediction.markdown(found), encoding="utf-8")
    return paths


def line(row: Row) -> str:
    """Return one row for people."""
    what = f"{row.name:24} {row.provider:40} {row.case:60} {row.metric:16}"
    return f"{what} {row.p50:10.2f} {row.unit} ({row.p20:.2f} to {row.p80:.2f}, n={row.n})\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line of ``python -m benchmarks.kernels``; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--predict", choices=sorted(prediction.DEVICES), help="count instead of measuring")
    task.add_argument("--tune", action="store_true", help="find launch configurations and write them into the tables")
    parser.add_argument("--op", action="append", choices=list(SPECS), help="with --tune: only this one; repeatable")
    parser.add_argument("--output", type=Path, help="writes OUTPUT.json; with --predict, the folder to write to")
    args = parser.parse_args(arguments)
    if args.predict:
        for path in write_prediction(args.predict, args.output or RESULTS):
            sys.stdout.write(f"{path}\n")
        return 0
    if not torch.cuda.is_available():
        sys.stderr.write(
            f"error: torch {torch.__version__} sees no CUDA GPU, and kernels are measured on one. "
            "Run this on a machine with a GPU, or count with: --predict h200\n"
        )
        return _NO_GPU
    bench = Bench("cuda")
    if args.tune:
        with torch.no_grad():
            for path in tune.tune_all(bench, _tell, args.op or list(SPECS)):
                sys.stdout.write(f"{path}\n")
        return 0
    rows = []
    for row in run(bench):
        sys.stdout.write(line(row))
        rows.append(asdict(row))
        if args.output:  # after every row, so that an interrupted run is not lost
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.with_name(f"{args.output.name}.json").write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
    return 0


def _tell(text: str) -> None:
    """Tell the user how far it is."""
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
