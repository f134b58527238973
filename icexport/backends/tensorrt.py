"""TensorRT and TensorRT-RTX: plans, built once and kept in the engine store."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engines import registry
from icexport.backends.plans import PLAN_BACKENDS
from icexport.bundle.engine_store import EngineStore
from icexport.bundle.manifest import EngineEntry
from icexport.bundle.store import Bundle
from icexport.host.files import digest

if TYPE_CHECKING:
    from engines.tensorrt.scratch import Scratch


logger = logging.getLogger(__name__)


def compiled_kernels(key: str) -> Path | None:
    """File for the kernels that TensorRT-RTX compiles for this GPU from a plan; None: no place to keep them."""
    folder = EngineStore().kernels
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("Kernels are compiled in every process, for %s cannot be written: %s", folder, error)
        return None
    return folder / f"{key}.cache"


def make_scratch(backend: str, device: str | torch.device) -> Scratch | None:
    """Memory that the engines of one pipeline share, for the backends whose engines take some."""
    if backend not in PLAN_BACKENDS:
        return None
    from engines.tensorrt.scratch import Scratch

    return Scratch(device)


def refusal(bundle: Bundle, key: str, engine: EngineEntry, device: str | torch.device) -> str:
    """Why a plan cannot be used on ``device``; empty if nothing speaks against it.

    A plan belongs to one graph with its weights, one version of its library, and one kind of GPU.
    """
    parts, graph = engine.report.get("made_from", {}), bundle.manifest.graphs[engine.graph]
    file = graph.plugin_file if parts.get("kernels") else graph.file
    weights = (bundle.manifest.files.get(file or ""), bundle.manifest.files.get(f"{file}.data", ""))
    if digest(parts) != key or (parts.get("graph"), parts.get("weights")) != weights:
        return "it was made from another graph or other weights than the bundle holds"
    installed = registry.check(engine.backend).version
    if installed != engine.version:
        return f"it was built by {engine.backend} {engine.version}, and {installed or 'none'} is installed"
    if engine.device == "portable":
        return ""
    name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    capability = f"sm_{major}{minor}"
    fits = (
        capability in engine.device.split("+")
        if engine.backend == "tensorrt-rtx"
        else f"{name} {capability}" == engine.device
    )
    return "" if fits else f"it was built for {engine.device}, and {device} is {name} ({capability})"


def rebuild_command(bundle: Bundle, backend: str) -> str:
    """The command that builds a bundle's engines again on this machine."""
    manifest, profile = bundle.manifest, bundle.manifest.profile
    source = manifest.source
    sizes = [("--shape", f"{h}x{w}") for h, w in profile.shapes] or [
        ("--height", str(profile.height)),
        ("--width", str(profile.width)),
    ]
    options = [
        ("--cond", manifest.condition["name"]),
        ("--model", source["model"]),
        *((f"--{part}", source[part]) for part in ("controlnet", "probe") if source[part]),
        ("--backend", backend),
        ("--dtype", manifest.dtype),
        *sizes,
        ("--batch-size", str(profile.batch)),
        ("--output", str(bundle.path)),
    ]
    return shlex.join(["icexport", "build", *(word for option in options for word in option)])
