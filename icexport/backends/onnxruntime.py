"""ONNX Runtime: runs the bundle's ONNX files as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engines.base import Availability
from icexport.backends.base import Backend, EngineRequest, Made, found
from icexport.bundle.records import EngineEntry

if TYPE_CHECKING:
    import torch

    from engines.base import Engine
    from engines.tensorrt.scratch import Scratch
    from icexport.bundle.store import Bundle


class OnnxRuntime(Backend):
    """ONNX Runtime on CPU and CUDA. It has no bfloat16 kernels for most operators."""

    name = "onnxruntime"
    summary = "ONNX Runtime, CPU and CUDA"
    dtypes = ("fp32", "fp16")

    def check(self) -> Availability:
        """See ``Backend.check``."""
        return found("engines.onnxruntime", lambda module: module.check())

    def make(self, request: EngineRequest, made: Made) -> EngineEntry:
        """Make nothing; see ``Backend.make``."""
        return EngineEntry(request.graph, self.name, made.parts["version"], made_from=made.parts)

    def open(
        self, bundle: Bundle, key: str, entry: EngineEntry, device: str | torch.device, scratch: Scratch | None = None
    ) -> Engine:
        """Return a session on the graph's file; see ``Backend.open``."""
        from engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(entry.graph, bundle.onnx(entry.graph), device)
