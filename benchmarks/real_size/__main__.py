"""Stable Diffusion 1.5's architecture with random weights, from folders to bundles to pictures, stage by stage.

    python -m benchmarks.real_size --output DIR

Each stage is a process of its own: time, peak memory, and the longest time without a line on stderr. Results go to
DIR/real-size.json as they come, and to DIR/real-size.md; output and pictures of the stages to DIR/stages. A stage that
fails is recorded, and the next ones go on where they can. The CPU is measured, also where there is a GPU. sd15 writes
some 15 GB and takes long. Exit code 1: a stage did not end well.

--growth runs other stages: builds and pictures of several sizes, batches and threads. Their results are in
DIR/growth.json and DIR/growth.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.real_size.report import markdown
from benchmarks.real_size.stages import SIDES, all_stages, growth_stages
from benchmarks.real_size.suite import OK, OtherResultsError, run

FAILED, USAGE = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line of ``python -m benchmarks.real_size``; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_size",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of results and models")
    parser.add_argument("--size", choices=SIDES, default="sd15", help="tiny: the reference model's size, 64 px")
    parser.add_argument("--stages", metavar="A,B,...", help="some of them only; a wrong name lists all")
    parser.add_argument("--growth", action="store_true", help="how memory and time grow, instead")
    parser.add_argument("--resume", action="store_true", help="do not run stages again that have a result in DIR")
    parser.add_argument(
        "--build-options",
        default="",
        metavar="TEXT",
        help="further options of icexport build; with an equals sign: --build-options=--no-verify",
    )
    parser.add_argument(
        "--memory-limit", type=float, default=22.0, metavar="GB", help="of a stage; beyond it is killed (default 22)"
    )
    args = parser.parse_args(arguments)
    stages = (growth_stages if args.growth else all_stages)(args.size, shlex.split(args.build_options))
    names = [stage.name for stage in stages]
    wanted = args.stages.split(",") if args.stages else names
    unknown = [name for name in wanted if name not in names]
    if unknown or args.memory_limit <= 0:
        what = f"--memory-limit {args.memory_limit:g}: must be above 0"
        if unknown:
            what = f"--stages {','.join(unknown)}: the stages are {', '.join(names)}"
        sys.stderr.write(f"error: {what}.\n")
        return USAGE
    try:
        document = run(
            [stage for stage in stages if stage.name in wanted],
            args.output,
            size=args.size,
            name="growth" if args.growth else "real-size",
            limit=int(args.memory_limit * 1e9),
            resume=args.resume,
            tell=_tell,
        )
    except OtherResultsError as error:
        sys.stderr.write(f"error: {error}\n")
        return USAGE
    sys.stdout.write(markdown(document))
    return 0 if all(document["stages"][name]["status"] == OK for name in wanted) else FAILED


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
