"""Everything that needs a GPU, in one command of less than ten minutes, into one JSON file.

    python -m benchmarks.gpu_suite --output builds/gpu

Runs from a checkout, without installing icexport. Each phase has a process of its own and its share of the time; what
fails is recorded, and the suite goes on. A second start with --resume runs what did not go well before, or was changed
since. What the machine lacks is recorded as not available, with the reason. Exit code 1: a phase failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import OK, Context
from benchmarks.gpu.suite import Phase, run_suite

PHASES = (
    Phase("environment", "benchmarks.gpu.phases:environment", 20),
    Phase("correctness", "benchmarks.gpu.phases:correctness", 110),
    Phase("engines", "benchmarks.gpu.models:engines", 140),
    Phase("step", "benchmarks.gpu.step:step", 70),
    Phase("kernels", "benchmarks.gpu.phases:kernels", 90),
    Phase("graphs", "benchmarks.gpu.models:graphs", 40),
    Phase("latency", "benchmarks.gpu.models:latency", 50),
    Phase("gpu_tests", "benchmarks.gpu.phases:gpu_tests", 60),
    # From here on what takes long, and may not end in time on a slow machine: a second start goes on with it.
    Phase("exported_step", "benchmarks.gpu.step:exported", 40),
    Phase("compiled_step", "benchmarks.gpu.step:compiled", 110),
    Phase("compiled_kernels", "benchmarks.gpu.phases:compiled_kernels", 80),
)
FAILED, USAGE = 1, 2


def summary(merged: dict[str, Any]) -> str:
    """Return the result for people."""
    lines = [f"{merged['gpu']}, driver {merged['driver']}, commit {merged['commit']}, sources {merged['sources']}"]
    for name, result in merged["phases"].items():
        lines.append(f"{name:16} {result['status']:14} {result['seconds']:6.1f} s  {result['error']}".rstrip())
        lines += [
            f"    {item['name']}: {item['status']}: {item['reason']}"
            for item in result["items"]
            if item["status"] != OK
        ]
    for name, goal in merged["goals"].items():
        limit = ", ".join(
            f"{word.replace('_', ' ')} {goal[word]:g}" for word in ("at_least", "at_most") if word in goal
        )
        lines.append(f"{'met' if goal['met'] else 'MISSED':7} {name}: {goal['value']:.4g} ({limit})")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None, phases: Sequence[Phase] = PHASES) -> int:
    """Run the command line of ``python -m benchmarks.gpu_suite``; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for <phase>.json and <gpu>-<date>.json")
    parser.add_argument("--work", type=Path, help="folder for bundles and logs; default: OUTPUT with -work at its end")
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything (default 10)")
    parser.add_argument("--resume", action="store_true", help="keep results in OUTPUT that went well")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run with tiny sizes")
    parser.add_argument("--phase", action="append", choices=[phase.name for phase in phases], help="repeatable")
    args = parser.parse_args(arguments)
    problem = _problem(args.output, args.resume, args.device, args.minutes)
    if problem:
        sys.stderr.write(f"error: {problem}\n")
        return USAGE
    work = args.work or args.output.with_name(f"{args.output.name}-work")
    context = Context(args.device, work.resolve())
    options: dict[str, Any] = {"seconds": 60 * args.minutes, "only": args.phase or (), "progress": _tell}
    merged = run_suite(phases, args.output.resolve(), context, **options)
    sys.stdout.write(summary(merged))
    return 0 if merged["status"] == OK else FAILED


def _problem(output: Path, resume: bool, device: str, minutes: float) -> str:
    """Return why the suite cannot begin; empty if it can."""
    if minutes <= 0:
        return f"--minutes {minutes:g}: give a positive number."
    if output.is_dir() and any(output.glob("*.json")) and not resume:
        return f"{output} holds results. Continue them with --resume, or choose another --output."
    if device == "cuda" and not _has_gpu():
        return "torch sees no CUDA GPU. Run this on a machine with one, or try the suite itself with --device cpu."
    return ""


def _has_gpu() -> bool:
    """Tell whether torch sees a GPU, in another process: this one holds no context on it while the phases measure."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603  fixed arguments


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
