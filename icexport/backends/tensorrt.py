"""TensorRT and TensorRT-RTX: plans, built once and kept in the engine store."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.base import Availability
from engines.errors import BackendUnavailableError
from icexport.backends.base import Backend, EngineRequest, Made, PlanOptions, found
from icexport.backends.plans import PLAN_NAME, build_plan
from icexport.bundle.engine_store import EngineStore
from icexport.bundle.records import EngineEntry
from icexport.errors import BundleError, UsageError
from icexport.host.files import digest
from icexport.models.precision import precision

if TYPE_CHECKING:
    import torch

    from engines.base import Engine
    from engines.tensorrt.scratch import Scratch
    from icexport.bundle.store import Bundle

logger = logging.getLogger(__name__)

_LEVELS = range(6)


class TensorRt(Backend):
    """Classic TensorRT, which builds for the GPU of this machine."""

    name = "tensorrt"
    summary = "TensorRT plans, NVIDIA GPUs"
    needs_gpu = True
    stores = True
    copies_weights = True
    prefers_fixed_batch = True
    takes_plugins = True
    capturable = True

    def check(self) -> Availability:
        """See ``Backend.check``."""
        return found("engines.tensorrt.api", lambda api: api.check(self.name))

    def check_options(self, options: PlanOptions, dtype: str) -> None:
        """Check levels and limits of TensorRT's builder, and what the probe's plugins need; see ``Backend``."""
        super().check_options(options, dtype)
        if options.optimization_level not in _LEVELS:
            raise UsageError(f"--optimization-level {options.optimization_level}: choose 0 to {_LEVELS[-1]}.")
        if options.workspace_bytes is not None and options.workspace_bytes < 1:
            raise UsageError("--workspace must be at least 1 MiB.")
        if self.takes_plugins and options.plugins and find_spec("triton") is None:
            raise BackendUnavailableError(
                "The probe's plugins are compiled by Triton, which is not installed. Run: pip install triton, or "
                "choose --no-plugins."
            )

    def target(self, options: PlanOptions) -> str:
        """Return the GPU of this machine, or those that are built for; see ``Backend.target``."""
        from engines.tensorrt import api

        return api.device_tag(self.name, options.targets if self.takes_targets else (), None)

    def key_options(self, options: PlanOptions) -> dict[str, Any]:
        """Return what the builder is told; see ``Backend.key_options``."""
        return {"optimization_level": options.optimization_level, "workspace_bytes": options.workspace_bytes}

    def make(self, request: EngineRequest, made: Made) -> EngineEntry:
        """Take it from the store, or build it; see ``Backend.make``."""
        return build_plan(self.name, request, made, request.options.targets if self.takes_targets else ())

    def refusal(self, bundle: Bundle, key: str, entry: EngineEntry, device: str | torch.device) -> str:
        """Tell what a plan does not fit: its graph and weights, its version of the library, or its kinds of GPU."""
        parts, graph = entry.made_from, bundle.manifest.graphs[entry.graph]
        file = graph.plugin_file if parts.get("kernels") else graph.file
        weights = (bundle.manifest.files.get(file or ""), bundle.manifest.files.get(f"{file}.data", ""))
        if digest(parts) != key or (parts.get("graph"), parts.get("weights")) != weights:
            return "it was made from another graph or other weights than the bundle holds"
        installed = self.check().version
        if installed != entry.version:
            return f"it was built by {self.name} {entry.version}, and {installed or 'none'} is installed"
        if entry.device == "portable":
            return ""
        import torch

        name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        if self.fits(entry.device, name, f"sm_{major}{minor}"):
            return ""
        return f"it was built for {entry.device}, and {device} is {name} (sm_{major}{minor})"

    def fits(self, built_for: str, name: str, capability: str) -> bool:
        """Tell whether a plan runs on a GPU of this name and compute capability."""
        return f"{name} {capability}" == built_for

    def scratch(self, device: str | torch.device) -> Scratch:
        """Return scratch memory for plans that run in turn; see ``Backend.scratch``."""
        from engines.tensorrt.scratch import Scratch

        return Scratch(device)

    def open(
        self, bundle: Bundle, key: str, entry: EngineEntry, device: str | torch.device, scratch: Scratch | None = None
    ) -> Engine:
        """Return the plan on the GPU; see ``Backend.open``."""
        from engines.tensorrt.engine import TensorRtEngine
        from icexport.graphs.graph import specs

        bundle.verify(entry.files)
        graph = bundle.graph(entry.graph)
        plan = bundle.path / next(file for file in entry.files if file.endswith(PLAN_NAME))
        return TensorRtEngine(
            entry.graph,
            plan,
            specs(graph.inputs),
            specs(graph.outputs),
            flavour=self.name,
            device=device,
            scratch=scratch,
            runtime_cache=self.kernel_cache(key),
        )

    def kernel_cache(self, _key: str) -> Path | None:
        """Return the file for kernels that the library compiles when it loads a plan; None: it compiles none."""
        return None


class TensorRtRtx(TensorRt):
    """TensorRT-RTX, which builds for other machines' GPUs, too."""

    name = "tensorrt-rtx"
    summary = "TensorRT-RTX plans, GeForce and RTX GPUs"
    takes_plugins = False
    takes_targets = True

    def check_options(self, options: PlanOptions, dtype: str) -> None:
        """Check the GPUs that are named, too; see ``TensorRt``."""
        from engines.tensorrt.api import RTX_TARGETS

        super().check_options(options, dtype)
        if unknown := sorted(set(options.targets) - set(RTX_TARGETS)):
            raise UsageError(
                f"--target-sm {' '.join(map(str, unknown))}: TensorRT-RTX builds for "
                f"{', '.join(map(str, RTX_TARGETS))}. For other GPUs, such as Hopper (90), use --backend tensorrt on "
                "such a GPU."
            )
        if old := [target for target in options.targets if target < precision(dtype).capability]:
            raise UsageError(
                f"--target-sm {' '.join(map(str, old))}: has no {precision(dtype).torch_name}. Leave it out, or "
                "choose fp16."
            )

    def fits(self, built_for: str, name: str, capability: str) -> bool:
        """See ``TensorRt``; any of several capabilities."""
        return capability in built_for.split("+")

    def kernel_cache(self, key: str) -> Path | None:
        """Return the file for kernels that are compiled for this GPU from a plan; None: no place to keep them."""
        try:
            return EngineStore().kernels(key)
        except BundleError as error:
            logger.warning("Kernels are compiled in every process. %s", error)
            return None
