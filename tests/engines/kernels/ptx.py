"""What a PTX text declares, and what ptxas says of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from triton.backends.nvidia.compiler import get_ptxas

from engines.kernels.aot import Ptx


@dataclass(frozen=True)
class Resources:
    """What one thread of a kernel needs.

    Attributes:
        registers: number of 32-bit registers.
        spill_bytes: bytes stored to and loaded from local memory for lack of registers.
    """

    registers: int
    spill_bytes: int


def parameters(text: str) -> list[str]:
    """Declarations in the entry, e.g. ``.param .u32 name_param_3``."""
    (declared,) = re.findall(r"\.entry\s+\w+\s*\(([^)]*)\)", text)
    return [declaration.strip() for declaration in declared.split(",")]


def target(text: str) -> str:
    """Architecture, e.g. ``sm_90a``."""
    (found,) = re.findall(r"^\.target\s+(\w+)", text, re.MULTILINE)
    return str(found)


def resources(ptx: Ptx, capability: int) -> Resources:
    """Assemble PTX for a GPU with Triton's ptxas, which must succeed."""
    own = target(ptx.text)
    gpu = own if own.rstrip("a") == f"sm_{capability}" else f"sm_{capability}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx.text, encoding="utf-8")
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={gpu}", str(source), "-o", f"{source}.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ptxas refuses {ptx.name} ({own}) for {gpu}: {done.stderr}"
    (registers,) = re.findall(r"Used (\d+) registers", done.stderr)
    return Resources(int(registers), sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr))))
