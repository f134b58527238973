"""From a bundle's graphs to running engines."""

from __future__ import annotations

import logging
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import torch

from engines.base import Engine
from engines.registry import BACKENDS, resolve
from icexport.backends.plans import PLAN_BACKENDS, PLAN_NAME
from icexport.backends.tensorrt import compiled_kernels, rebuild_command, refusal
from icexport.backends.torch_eager import torch_module
from icexport.bundle.store import Bundle
from icexport.errors import BundleError
from icexport.graphs.graph import specs

if TYPE_CHECKING:
    from engines.tensorrt.scratch import Scratch


logger = logging.getLogger(__name__)


def load_engine(
    bundle: Bundle,
    graph: str,
    backend: str = "auto",
    device: str | torch.device | None = None,
    scratch: Scratch | None = None,
) -> Engine:
    """An engine for one graph of a bundle; the hash of every file that it reads is checked first.

    Args:
        bundle: the bundle.
        graph: name of the graph.
        backend: a backend's name or ``auto``, which takes the bundle's best one that can run here.
        device: ``cpu``, ``cuda`` or ``cuda:<i>``; None: see ``default_device``.
        scratch: memory that TensorRT engines, which never run at the same time, share; None: one of its own.

    Raises:
        BackendUnavailableError: the backend cannot run on the device.
        BundleError: the bundle has no such graph, was not built for this backend, or its plan does not fit here.
        DamagedBundleError: a file was changed.
    """
    device = device or default_device(bundle, backend)
    name = choose_backend(bundle, backend, device)
    entry = bundle.graph(graph)
    if name == "onnxruntime":
        from engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(graph, bundle.onnx(graph), device)
    found = [(k, e) for k, e in bundle.manifest.engines.items() if (e.graph, e.backend) == (graph, name)]
    if not found or not found[0][1].files:
        raise BundleError(f"{bundle.path} has no {name} engine for {graph}. Build it again with --backend {name}.")
    key, engine = found[0]
    if name in PLAN_BACKENDS:
        from engines.tensorrt.engine import TensorRtEngine

        if reason := refusal(bundle, key, engine, device):
            raise BundleError(
                f"The {name} plan of {graph} in {bundle.path} cannot run here: {reason}. Build it for this machine "
                f"with: {rebuild_command(bundle, name)}"
            )
        bundle.verify(engine.files)
        plan = bundle.path / next(file for file in engine.files if file.endswith(PLAN_NAME))
        inputs, outputs = specs(entry.inputs), specs(entry.outputs)
        kernels = compiled_kernels(key) if name == "tensorrt-rtx" else None
        return TensorRtEngine(
            graph, plan, inputs, outputs, flavour=name, device=device, scratch=scratch, runtime_cache=kernels
        )
    from engines.torch_eager import TorchEngine

    folder = bundle.folder(PurePosixPath(engine.files[0]).parent.as_posix())
    module = torch_module(graph, folder, bundle.manifest.configs, bundle.manifest.dtype)
    return TorchEngine(graph, module.to(device), specs(entry.inputs), specs(entry.outputs), device)


def built_backends(bundle: Bundle) -> tuple[str, ...]:
    """The backends that a bundle has engines for, in the order in which ``auto`` tries them."""
    built = {entry.backend for entry in bundle.manifest.engines.values()}
    return tuple(name for name in BACKENDS if name in built)


def default_device(bundle: Bundle, backend: str) -> str:
    """``cuda`` for a backend that runs nowhere else, and for a bundle that has no other; else ``cpu``."""
    names = built_backends(bundle) if backend == "auto" else (backend,)
    return "cuda" if names and set(names) <= set(PLAN_BACKENDS) else "cpu"


def choose_backend(bundle: Bundle, backend: str, device: str | torch.device) -> str:
    """The backend to run a bundle with: the named one, else the first of the bundle's that can use the device.

    Raises:
        BundleError: the bundle was not built for the named backend; the command that does is named.
        BackendUnavailableError: the backend, or every one of the bundle's, cannot use the device.
    """
    built = built_backends(bundle)
    if backend != "auto" and backend not in built:
        raise BundleError(
            f"{bundle.path} was built for {', '.join(built) or 'no backend'}, not for {backend}. Build it again with "
            f"--backend {backend}."
        )
    return resolve(backend, device, built)
