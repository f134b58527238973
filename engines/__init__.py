"""Run a graph on a device: one protocol, several engines.

Knows nothing of diffusion, and imports without torch; the modules of the engines (``engines.torch_eager``,
``engines.onnxruntime`` ...) import it. Which of them there are, `icexport.backends` knows.
"""

from engines.base import Availability, Engine, TensorSpec
from engines.errors import BackendUnavailableError, EngineError, ShapeError

__all__ = ["Availability", "BackendUnavailableError", "Engine", "EngineError", "ShapeError", "TensorSpec"]
