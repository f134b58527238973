"""Run a graph on a device: one protocol, several backends.

Knows nothing of diffusion. This package and its registry import without torch, so that a command line can list the
backends at once; the modules of the backends (``engines.torch_eager``, ``engines.onnxruntime``) import it.
"""

from engines.base import Availability, Engine, TensorSpec
from engines.errors import BackendUnavailableError, EngineError, ShapeError
from engines.registry import BACKENDS, Backend, available, check, resolve

__all__ = [
    "BACKENDS",
    "Availability",
    "Backend",
    "BackendUnavailableError",
    "Engine",
    "EngineError",
    "ShapeError",
    "TensorSpec",
    "available",
    "check",
    "resolve",
]
