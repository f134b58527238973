"""Runs a module on the first few processors: ``python -m benchmarks.real_size.pinned 1 icexport generate ...``."""

from __future__ import annotations

import os
import runpy
import sys


def main() -> None:
    """Run ``sys.argv[2]`` as ``python -m`` does, with the arguments behind it, on ``sys.argv[1]`` processors."""
    processors = sorted(os.sched_getaffinity(0))[: int(sys.argv[1])]
    os.sched_setaffinity(0, processors)
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
