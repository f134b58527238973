"""Runs the small cases of one operator in Triton's interpreter and prints the results as JSON.

A program of its own, because Triton looks at TRITON_INTERPRET when it is imported.
Usage: TRITON_INTERPRET=1 python tests/engines/kernels/interpreted.py <operator>
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch

from engines.kernels import tuning
from engines.kernels.check import check
from engines.kernels.spec import SPECS

# Small blocks, so that small maps already take several of them.
BLOCKS = {
    "dual_projection": {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16},
    "resize_group_norm_relu": {"BLOCK_C": 2, "BLOCK_P": 32, "ROWS": 8, "CELLS": 16},
    "residual_mix": {"BLOCK_C": 2, "BLOCK_P": 32, "ROWS": 8, "CELLS": 16},
    "fidelity_reduce": {"BLOCK": 128},
}


def main() -> None:
    torch.set_num_threads(1)
    name = sys.argv[1]
    spec = SPECS[name]
    config = tuning.LaunchConfig(BLOCKS[name], split=2, num_warps=4, num_stages=1, measured=False)
    tuning.choose = lambda *_: config
    results = []
    for case in spec.cases:
        if case.large:
            continue
        dtypes = {torch.float16}
        if case.values in ("randn", "constant") or torch.float16 not in spec.dtypes:
            dtypes.add(torch.float32)
        # The interpreter multiplies bfloat16 matrices as if their bits were integers.
        if case is spec.cases[0] and name != "dual_projection":
            dtypes.add(torch.bfloat16)
        results += [asdict(check(spec, case, "cpu", dtype, spec.run_kernel)) for dtype in dtypes & set(spec.dtypes)]
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
