"""What a backend is: one object that makes the engines of a bundle, says why one cannot run, and opens them.

Imports no torch, and neither do the modules of the backends until they have work to do: the command line lists them.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from engines.base import Availability
from icexport.backends.footprint import Footprint
from icexport.bundle.engine_store import EngineStore
from icexport.bundle.records import EngineEntry, GraphEntry
from icexport.errors import UsageError
from icexport.graphs.profile import Profile
from icexport.host.files import Hashes, digest
from icexport.progress import Progress

if TYPE_CHECKING:
    import torch

    from engines.base import Engine
    from engines.tensorrt.scratch import Scratch
    from icexport.bundle.store import Bundle
    from icexport.graphs.graph import Graph


@dataclass(frozen=True)
class PlanOptions:
    """What the user may say to a backend that compiles.

    Attributes:
        targets: compute capabilities, times ten, to build for; none: whatever the backend builds for by itself.
        optimization_level: 0 to 5: how long TensorRT's builder looks for faster kernels.
        workspace_bytes: most scratch memory that a layer may use; None: the builder's own limit.
        plugins: put the probe's Triton kernels into the engines of backends that take them.
    """

    targets: tuple[int, ...] = ()
    optimization_level: int = 3
    workspace_bytes: int | None = None
    plugins: bool = True


@dataclass(frozen=True)
class EngineRequest:
    """What an engine of one graph is made from, and where it goes.

    Attributes:
        graph: name of the graph.
        entry: the graph's files, inputs and outputs.
        folder: folder of the bundle that is being written; the files of ``entry`` are there.
        dtype: precision of the graph.
        profile: sizes of the bundle.
        multiple: pixels of one step of the symbols ``rows`` and ``columns``.
        options: the user's options.
        store: where engines are kept for other bundles.
        hashes: hashes of files that are known already.
        progress: told how far it is.
        module: the graph with its PyTorch module in memory; only for a backend that is made ``from_module``.
    """

    graph: str
    entry: GraphEntry
    folder: Path
    dtype: str
    profile: Profile
    multiple: int
    options: PlanOptions
    store: EngineStore
    hashes: Hashes
    progress: Progress
    module: Graph | None = None


@dataclass(frozen=True)
class Made:
    """An engine's identity while it is being made.

    Attributes:
        key: content address of the engine.
        parts: what the key is the digest of.
        onnx: the ONNX file to use.
        plugins: names of the plugins in that file.
    """

    key: str
    parts: dict[str, Any]
    onnx: Path
    plugins: tuple[str, ...]


class Backend(ABC):
    """One way to run a bundle's graphs.

    Attributes:
        name: name of the backend, as ``--backend`` takes it.
        summary: one line for ``--help`` and ``doctor``.
        dtypes: precisions that its engines can have; None: all.
        needs_gpu: whether it runs on a GPU only.
        from_module: whether its engines are made from the PyTorch module while that is in memory, and not from the
            ONNX file.
        stores: whether it keeps its engines in the engine store, for other bundles.
        copies_weights: whether its engines hold the weights once more.
        prefers_fixed_batch: whether it is fastest with a fixed number of pictures, which is then the default.
        takes_targets: whether it builds for GPUs that are named by their compute capability.
        takes_plugins: whether the probe's Triton kernels can be part of its engines.
        capturable: whether no call of its engines waits for the GPU, so that a CUDA graph can record them.
        concurrent: whether several threads may call one of its engines at once.
        footprint: what it takes of a CPU's memory; None: not known.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...] | None] = None
    needs_gpu: ClassVar[bool] = False
    from_module: ClassVar[bool] = False
    stores: ClassVar[bool] = False
    copies_weights: ClassVar[bool] = False
    prefers_fixed_batch: ClassVar[bool] = False
    takes_targets: ClassVar[bool] = False
    takes_plugins: ClassVar[bool] = False
    capturable: ClassVar[bool] = False
    concurrent: ClassVar[bool] = False
    footprint: ClassVar[Footprint | None] = None

    @abstractmethod
    def check(self) -> Availability:
        """Tell whether it can be used here; a library that is missing or broken is an answer, not an error."""

    def check_options(self, options: PlanOptions, dtype: str) -> None:
        """Refuse, before the long work, what it could not build.

        Args:
            options: the user's options.
            dtype: name of the precision.

        Raises:
            UsageError: an option is out of range, or does not fit the precision.
            BackendUnavailableError: something that an option needs is missing.
        """
        if self.dtypes is not None and dtype not in self.dtypes:
            raise UsageError(
                f"--dtype {dtype}: backend {self.name} takes {' or '.join(self.dtypes)}. Choose one of these, or "
                "another --backend."
            )

    def target(self, options: PlanOptions) -> str:
        """Return what its engines are tied to: ``any``, or the GPUs that they are built for. Part of the key."""
        return "any"

    def key_options(self, options: PlanOptions) -> dict[str, Any]:
        """Return those options that change what it builds and show nowhere else in the key."""
        return {}

    def identity(self, options: PlanOptions) -> dict[str, Any]:
        """Return what a bundle's key holds of this backend: version, and the options that change its engines."""
        return {
            "version": self.check().version,
            "options": self.key_options(options),
            "targets": list(options.targets) if self.takes_targets else [],
            "plugins": self.takes_plugins and options.plugins,
        }

    @abstractmethod
    def make(self, request: EngineRequest, made: Made) -> EngineEntry:
        """Bring one engine into the bundle that is being written.

        Args:
            request: what to make it from.
            made: the engine's key, and the ONNX file to use.

        Raises:
            EngineError: the engine could not be built; the builder's own words are in the message.
            BundleError: the engine store cannot be written.
        """

    def refusal(self, bundle: Bundle, key: str, entry: EngineEntry, device: str | torch.device) -> str:
        """Return why an engine of a bundle cannot be used on ``device``; empty if nothing speaks against it."""
        return ""

    def scratch(self, device: str | torch.device) -> Scratch | None:
        """Return memory that a pipeline's engines, which never run at the same time, share; None: they share none."""
        return None

    @abstractmethod
    def open(
        self, bundle: Bundle, key: str, entry: EngineEntry, device: str | torch.device, scratch: Scratch | None = None
    ) -> Engine:
        """Load one engine of a bundle; the hash of every file that it reads is checked first.

        Args:
            bundle: the bundle.
            key: key of the engine.
            entry: the manifest's entry of the engine.
            device: ``cpu``, ``cuda`` or ``cuda:<i>``.
            scratch: memory from ``scratch``.

        Raises:
            BackendUnavailableError: the library or the device cannot be used.
            DamagedBundleError: a file was changed.
            EngineError: the engine cannot be loaded.
        """


def make_engine(backend: Backend, request: EngineRequest) -> dict[str, EngineEntry]:
    """Make one engine. This is where its key is made, for every backend.

    Returns:
        The manifest's entry by the key. Errors are those of ``Backend.make``.
    """
    plugins = backend.takes_plugins and request.options.plugins and request.entry.plugin_file is not None
    file = str(request.entry.plugin_file) if plugins else request.entry.file
    onnx = request.folder / file
    data = onnx.with_name(f"{onnx.name}.data")
    parts = key_parts(
        graph_hash=request.hashes(onnx),
        weights_hash=request.hashes(data) if data.exists() else "",
        profile=request.profile,
        dtype=request.dtype,
        backend=backend.name,
        version=backend.check().version or "",
        device=backend.target(request.options),
        kernels=_kernel_hash() if plugins else "",
        options=backend.key_options(request.options),
    )
    key = digest(parts)
    made = Made(key, parts, onnx, tuple(request.entry.plugins) if plugins else ())
    return {key: backend.make(request, made)}


def key_parts(
    *,
    graph_hash: str,
    weights_hash: str,
    profile: Profile,
    dtype: str,
    backend: str,
    version: str,
    device: str,
    kernels: str = "",
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return all that could change what an engine computes; its digest is the engine's key, its content address.

    Args:
        graph_hash: SHA-256 of the ``.onnx`` file.
        weights_hash: SHA-256 of its ``.data`` file; two ControlNets of one architecture differ only here.
        profile: sizes that the engine is built for.
        dtype: precision of the graph.
        backend: name of the backend, which builds and runs the engine.
        version: version of the backend.
        device: ``any``, or the compute capabilities or the GPU that the engine is built for.
        kernels: hash of the custom kernels inside, empty for none.
        options: options of the builder.
    """
    return {
        "graph": graph_hash,
        "weights": weights_hash,
        "profile": profile.to_json(),
        "dtype": dtype,
        "backend": backend,
        "version": version,
        "device": device,
        "kernels": kernels,
        "options": dict(options or {}),
    }


def found(module: str, check: Callable[[Any], Availability]) -> Availability:
    """Return what ``check`` says of an engine's module; that it cannot be imported is an answer, too."""
    try:
        return check(importlib.import_module(module))
    except (ImportError, OSError) as error:
        return Availability(False, None, f"{module} cannot be imported: {error}", "Install icexport again", ())


def _kernel_hash() -> str:
    from engines.kernels.plugins import kernel_hash

    return kernel_hash()
