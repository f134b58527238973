"""From a bundle's graphs to running engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from icexport.backends.table import BACKENDS, get, resolve
from icexport.bundle.store import Bundle
from icexport.errors import BundleError

if TYPE_CHECKING:
    import torch

    from engines.base import Engine
    from engines.tensorrt.scratch import Scratch


def load_engine(
    bundle: Bundle,
    graph: str,
    backend: str = "auto",
    device: str | torch.device | None = None,
    scratch: Scratch | None = None,
) -> Engine:
    """Return an engine for one graph of a bundle; the hash of every file that it reads is checked first.

    Args:
        bundle: the bundle.
        graph: name of the graph.
        backend: a backend's name or ``auto``, which takes the bundle's best one that can run here.
        device: ``cpu``, ``cuda`` or ``cuda:<i>``; None: see ``default_device``.
        scratch: memory to share with engines that never run at the same time; None: the engine gets some of its own.

    Raises:
        BackendUnavailableError: the backend cannot run on the device.
        BundleError: the bundle has no such graph, was not built for this backend, or its engine does not fit here.
        DamagedBundleError: a file was changed.
    """
    device = device or default_device(bundle, backend)
    name = choose_backend(bundle, backend, device)
    bundle.graph(graph)
    found = [(k, e) for k, e in bundle.manifest.engines.items() if (e.graph, e.backend) == (graph, name)]
    if not found:
        raise BundleError(f"{bundle.path} has no {name} engine for {graph}. Build it again with --backend {name}.")
    key, entry = found[0]
    if reason := get(name).refusal(bundle, key, entry, device):
        raise BundleError(
            f"The {name} engine of {graph} in {bundle.path} cannot run here: {reason}. Build it for this machine "
            f"with: {bundle.manifest.rebuild_command(bundle.path, [name])}"
        )
    return get(name).open(bundle, key, entry, device, scratch)


def built_backends(bundle: Bundle) -> tuple[str, ...]:
    """Return the backends that a bundle has engines for, in the order in which ``auto`` tries them."""
    built = {entry.backend for entry in bundle.manifest.engines.values()}
    return tuple(name for name in BACKENDS if name in built)


def default_device(bundle: Bundle, backend: str) -> str:
    """Return ``cuda`` for a backend that runs nowhere else, and for a bundle that has no other; else ``cpu``."""
    names = built_backends(bundle) if backend == "auto" else (backend,)
    return "cuda" if names and all(get(name).needs_gpu for name in names) else "cpu"


def choose_backend(bundle: Bundle, backend: str, device: str | torch.device) -> str:
    """Return the backend to run a bundle with: the named one, else the first of the bundle's that can use the device.

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
