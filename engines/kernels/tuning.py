"""Launch configurations of the kernels: data in ``tuning/<op>.json``, chosen by device and problem size.

Nothing is tuned at run time: two runs on one device launch the same programs and give the same bits. A table says
whether its rows were measured on such a GPU or only thought out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FOLDER = Path(__file__).with_name("tuning")
_DEFAULT = "default"
_LARGE_PROGRAM = 16
_THREADS_PER_WARP = 32
_REGISTERS = 65536  # of one multiprocessor


@dataclass(frozen=True)
class LaunchConfig:
    """How to launch one kernel.

    Attributes:
        constants: block sizes, by the names of the kernel's constexpr arguments.
        split: number of programs that share one group, for the kernels that normalise; else 1.
        num_warps: number of warps of a program.
        num_stages: number of stages of Triton's software pipeline.
        measured: whether the configuration was found to be the fastest on such a GPU.
    """

    constants: Mapping[str, int]
    split: int
    num_warps: int
    num_stages: int
    measured: bool

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's options, as a launch takes them."""
        return compiler_options(self.num_warps, self.num_stages)


def compiler_options(num_warps: int, num_stages: int) -> dict[str, Any]:
    """Return the options for Triton's compiler; the same at a launch and ahead of time, for the same machine code."""
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if num_warps >= _LARGE_PROGRAM:
        # All that one program can have. Else ptxas makes room for a second one, which spills registers.
        options["maxnreg"] = _REGISTERS // (_THREADS_PER_WARP * num_warps)
    return options


def capability(tensor: Tensor) -> int | None:
    """Return the compute capability of a tensor's GPU, 90 for 9.0; None on a CPU (Triton's interpreter)."""
    if tensor.device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


@cache
def choose(op: str, capability: int | None, size: int, element_bytes: int) -> LaunchConfig:
    """Return the configuration for a kernel launch.

    Args:
        op: name of the operator.
        capability: compute capability of the GPU, 90 for 9.0; one without a table of its own, and None, take the
            default table.
        size: size of the problem, as the ``size`` entry of the operator's file counts it.
        element_bytes: size of an element of the inputs, in bytes.

    Returns:
        The first row of the table whose limits admit the problem.

    Raises:
        ValueError: if no such operator has a file.
    """
    tables = _tables(op)
    table = tables.get(str(capability), tables[_DEFAULT])
    row = next(
        row
        for row in table["rows"]
        if (row["size"] is None or size <= row["size"]) and element_bytes <= row["element_bytes"]
    )
    return LaunchConfig(row["constants"], row["split"], row["num_warps"], row["num_stages"], table["measured"])


@cache
def _tables(op: str) -> dict[str, Any]:
    path = _FOLDER / f"{op}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in _FOLDER.glob("*.json")))
        raise ValueError(f"there are no launch configurations for {op!r}; there are for: {known}.")
    tables: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["tables"]
    return tables
