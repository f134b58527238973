"""ONNX Runtime: runs the bundle's ONNX files, attention and norms in forms that need less memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engines.base import Availability
from icexport.backends.base import Backend, EngineRequest, Made, PlanOptions, found
from icexport.backends.footprint import Footprint
from icexport.bundle.records import EngineEntry

if TYPE_CHECKING:
    import torch

    from engines.base import Engine
    from engines.tensorrt.scratch import Scratch
    from icexport.bundle.store import Bundle


REWRITES = ("MultiHeadAttention", "split GroupNormalization")
"""Part of the engines' keys: a change of a rewrite gives it another name."""

_FEW_LARGE_TENSORS = ("vae_decoder",)
"""Graphs that need less memory without an arena."""


class OnnxRuntime(Backend):
    """ONNX Runtime on CPU and CUDA. It has no bfloat16 kernels for most operators."""

    name = "onnxruntime"
    summary = "ONNX Runtime, CPU and CUDA"
    dtypes = ("fp32", "fp16")
    concurrent = True
    footprint = Footprint({"fp32": 4.0, "fp16": 5.0}, sample=58, picture=6.5)

    def check(self) -> Availability:
        """See ``Backend.check``."""
        return found("engines.availability", lambda module: module.onnxruntime())

    def key_options(self, options: PlanOptions) -> dict[str, Any]:
        """Return which form of the graphs it runs; see ``Backend.key_options``."""
        return {"rewrites": list(REWRITES)}

    def make(self, request: EngineRequest, made: Made) -> EngineEntry:
        """Write the graph in forms that suit ONNX Runtime, if it has what they are for; see ``Backend.make``."""
        from engines.rewrites.rewrite import rewrite

        path = request.folder / "engines" / made.key / f"{request.graph}.onnx"
        report = rewrite(made.onnx, path)
        files = [path.relative_to(request.folder).as_posix()] if path.exists() else []
        return EngineEntry(request.graph, self.name, made.parts["version"], files, made_from=made.parts, report=report)

    def open(
        self, bundle: Bundle, key: str, entry: EngineEntry, device: str | torch.device, scratch: Scratch | None = None
    ) -> Engine:
        """Return a session on the engine's file, or on the graph's where it has none; see ``Backend.open``."""
        from engines.onnxruntime import OnnxRuntimeEngine

        plain = bundle.onnx(entry.graph)
        path = bundle.file(entry.files[0]) if entry.files else plain
        arena = entry.graph not in _FEW_LARGE_TENSORS
        return OnnxRuntimeEngine(entry.graph, path, device, weights=plain.parent, arena=arena)
