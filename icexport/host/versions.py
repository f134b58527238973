"""What is installed here and what the machine is. Imports no torch until a GPU is asked for."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

__version__ = "0.1.0"

_TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")


def versions() -> dict[str, str]:
    """Return the versions of icexport and of the libraries that shape a bundle."""
    return {"icexport": __version__, **{name: installed(name) for name in _TOOLS}}


def installed(name: str) -> str:
    """Return the version of a package; ONNX Runtime has another name where it is built for GPUs.

    Raises:
        PackageNotFoundError: the package is not installed.
    """
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        if name != "onnxruntime":
            raise
        return metadata.version("onnxruntime-gpu")


def version_of(name: str) -> str | None:
    """Return the version of a package; None: it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def machine(device: str = "cpu") -> dict[str, str]:
    """Return the processor and GPU, cores, threads, versions, and the commit where this is a checkout.

    ``instructions`` are those that torch uses, as ``AVX2``: where they are older than AVX512, it computes
    convolutions in float16 and bfloat16 some 80 times slower than in float32.
    """
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = models[0] if models else cpu
    found = {
        "CPU": cpu,
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
    }
    import torch

    if device.startswith("cuda"):
        found["GPU"] = torch.cuda.get_device_name(device)
    found["threads"] = str(torch.get_num_threads())
    found["instructions"] = torch.backends.cpu.get_cpu_capability()
    found |= {name: installed(name) for name in ("torch", "diffusers", "onnxruntime")}
    root, git = Path(__file__).parents[2], shutil.which("git")
    if git and (root / ".git").exists():
        command = [git, "-C", str(root), "describe", "--always", "--dirty"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  fixed arguments
        found |= {"commit": result.stdout.strip()} if result.returncode == 0 else {}
    return found
