"""Eager PyTorch, the reference: weights as safetensors, in diffusers' own layout."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from engines.base import Availability
from icexport.backends.base import Backend, EngineRequest, Made, found
from icexport.bundle.records import EngineEntry
from icexport.errors import BundleError

if TYPE_CHECKING:
    import torch

    from engines.base import Engine
    from engines.tensorrt.scratch import Scratch
    from icexport.bundle.store import Bundle


class TorchEager(Backend):
    """PyTorch without compilation, on CPU and CUDA."""

    name = "torch"
    summary = "eager PyTorch, the reference"
    from_module = True
    copies_weights = True
    capturable = True
    concurrent = True

    def check(self) -> Availability:
        """See ``Backend.check``."""
        return found("engines.torch_eager", lambda module: module.check())

    def make(self, request: EngineRequest, made: Made) -> EngineEntry:
        """Write the weights of the graph's model; see ``Backend.make``."""
        from icexport.backends.torch_modules import save_torch

        if request.module is None:
            raise BundleError(f"The torch engine of {request.graph} is made from its module, which is not there.")
        folder = request.folder / "engines" / made.key
        save_torch(request.module, folder)
        files = sorted(p.relative_to(request.folder).as_posix() for p in folder.iterdir())
        return EngineEntry(request.graph, self.name, made.parts["version"], files, made_from=made.parts)

    def open(
        self, bundle: Bundle, key: str, entry: EngineEntry, device: str | torch.device, scratch: Scratch | None = None
    ) -> Engine:
        """Return the module with its weights on ``device``; see ``Backend.open``."""
        from engines.torch_eager import TorchEngine
        from icexport.backends.torch_modules import torch_module
        from icexport.graphs.graph import specs

        graph = bundle.graph(entry.graph)
        folder = bundle.folder(PurePosixPath(entry.files[0]).parent.as_posix())
        module = torch_module(entry.graph, folder, bundle.manifest)
        return TorchEngine(entry.graph, module.to(device), specs(graph.inputs), specs(graph.outputs), device)
