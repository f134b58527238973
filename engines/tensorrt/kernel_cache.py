"""The file in which TensorRT-RTX keeps the kernels that it compiles for this machine's GPU."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from engines.errors import EngineError
from engines.tensorrt.complaints import Complaints

logger = logging.getLogger(__name__)


class KernelCache:
    """Compiled kernels of one plan, read from a file and written back to it.

    Args:
        path: the file; made if missing. One of another GPU, driver or version is replaced.
        options: ``IRuntimeConfig`` of the plan's execution contexts, which then compile into the cache.
        complaints: what the library says about the plan.

    Raises:
        EngineError: if the library refuses the cache.
    """

    def __init__(self, path: Path, options: Any, complaints: Complaints) -> None:
        self._path = path
        self._graph = complaints.graph
        self._kernels = options.create_runtime_cache()
        if path.is_file() and not self._kernels.deserialize(path.read_bytes()):
            logger.info("%s is of another GPU, driver or version: its kernels are compiled again", path)
        if not options.set_runtime_cache(self._kernels):
            raise complaints.failure("the runtime cache was refused", "Run without it: runtime_cache=None.")

    def save(self) -> None:
        """Write what TensorRT-RTX has compiled so far.

        Raises:
            EngineError: if the file cannot be written.
        """
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(self._kernels.serialize())
            temporary.replace(self._path)
        except OSError as error:
            raise EngineError(
                f"the kernels of graph {self._graph!r} cannot be written to {self._path}: {error}. Make its folder "
                "writable, choose another one, or run without: runtime_cache=None."
            ) from error
