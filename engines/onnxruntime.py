"""ONNX Runtime on CPU and CUDA, reading and writing torch memory in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engines import availability
from engines.base import TensorSpec, as_device, check_inputs, require_device, select_outputs
from engines.errors import BackendUnavailableError, EngineError, OutOfMemoryError
from engines.interrupt import Interruptible

_LOG_FATAL_ONLY = 4
"""Errors come as exceptions, with the same text."""
_OUT_OF_MEMORY = ("bad_alloc", "Failed to allocate memory", "out of memory")
_DTYPES: dict[str, tuple[torch.dtype, type[np.generic]]] = {
    "tensor(float)": (torch.float32, np.float32),
    "tensor(float16)": (torch.float16, np.float16),
    "tensor(double)": (torch.float64, np.float64),
    "tensor(int64)": (torch.int64, np.int64),
    "tensor(int32)": (torch.int32, np.int32),
    "tensor(int8)": (torch.int8, np.int8),
    "tensor(uint8)": (torch.uint8, np.uint8),
    "tensor(bool)": (torch.bool, np.bool_),
}
_NUMPY = dict(_DTYPES.values())


class OnnxRuntimeEngine:
    """Runs an ONNX file in an ONNX Runtime session.

    Inputs are read from, and outputs written to, the memory of torch tensors. The shape of an output may depend only
    on the shapes of the inputs: where it has other sizes than they, it is learned at the first call with these shapes
    (which copies the output once).

    Args:
        name: of the graph.
        path: the ONNX file; its external data, if any, lies beside it.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:<i>"``.
        weights: folder of the file's external data; None: that of the file.
        threads: number of CPU threads within an operator; None leaves the choice to ONNX Runtime.
        arena: on a CPU, take what a call needs from an arena, and hold no tensor longer than it is read. That is least
            for graphs of many tensors; with few large ones, of which the arena's pieces are no multiples, it is more.

    Raises:
        BackendUnavailableError: if ONNX Runtime or the device cannot be used. There is no fallback to another device.
        EngineError: if the file is missing, damaged, or has a tensor type that torch does not share.
    """

    backend = "onnxruntime"

    def __init__(
        self,
        name: str,
        path: str | Path,
        device: str | torch.device = "cpu",
        *,
        weights: str | Path | None = None,
        threads: int | None = None,
        arena: bool = False,
    ) -> None:
        self.name = name
        self.path = Path(path)
        self.weights = Path(weights) if weights is not None else self.path.parent
        self.device = as_device(device)
        require_device(self.backend, availability.onnxruntime(), self.device.type)
        # Any: onnxruntime ships no type information.
        self._arena = arena and self.device.type == "cpu"
        self._session: Any | None = _open_session(self.path, self.weights, self.device, threads, self._arena)
        self.inputs = tuple(_spec(node, self.path) for node in self._session.get_inputs())
        self.outputs = tuple(_spec(node, self.path) for node in self._session.get_outputs())
        self._dtypes = {spec.name: spec.dtype for spec in self.outputs}
        self._shapes: dict[tuple[torch.Size, ...], dict[str, torch.Size]] = {}
        self._run = Interruptible()

    def __call__(self, inputs: Mapping[str, Tensor], outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Run the graph once; see ``engines.Engine``. Blocks until the outputs are written."""
        session = self._session
        if session is None:
            raise EngineError(f"graph {self.name!r} ({self.path}) was closed and cannot be run. Build a new engine.")
        names = select_outputs(self, outputs)
        tensors = [tensor.contiguous() for tensor in check_inputs(self, inputs)]
        given = tuple(tensor.shape for tensor in tensors)
        if given not in self._shapes:
            self._shapes[given] = self._known_shapes(given)
        shapes = self._shapes[given]
        results = {
            name: torch.empty(shapes[name], dtype=self._dtypes[name], device=self.device)
            for name in names
            if name in shapes
        }

        where = (self.device.type, self.device.index or 0)
        binding = session.io_binding()
        for spec, tensor in zip(self.inputs, tensors, strict=True):
            binding.bind_input(spec.name, *where, _NUMPY[spec.dtype], tuple(tensor.shape), tensor.data_ptr())
        for name in names:
            if name in results:
                tensor = results[name]
                binding.bind_output(name, *where, _NUMPY[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
            else:
                binding.bind_output(name, *where)
        if self.device.type == "cuda":
            # ONNX Runtime works on a stream of its own: what torch still has queued for the bound memory comes first.
            torch.cuda.current_stream(self.device).synchronize()
        options = _run_options(self._arena)
        try:
            self._run(
                lambda: session.run_with_iobinding(binding, options), lambda: setattr(options, "terminate", True)
            )
        except Exception as error:  # the exceptions of ONNX Runtime have no base class of their own
            raise _failure(error, f"graph {self.name!r} ({self.path}) failed in ONNX Runtime: {error}") from error

        for name, value in zip(names, binding.get_outputs(), strict=True):
            if name not in results:
                results[name] = torch.tensor(value.numpy(), device=self.device)
                shapes[name] = results[name].shape
        return {name: results[name] for name in names}

    def _known_shapes(self, given: Sequence[torch.Size]) -> dict[str, torch.Size]:
        """Return the shapes of the outputs whose every size is fixed or one of the inputs'."""
        sizes: dict[int | str, int] = {
            size: size for spec in self.outputs for size in spec.shape if isinstance(size, int)
        }
        for spec, shape in zip(self.inputs, given, strict=True):
            sizes.update(zip(spec.shape, shape, strict=True))
        known = [spec for spec in self.outputs if sizes.keys() >= set(spec.shape)]
        return {spec.name: torch.Size(sizes[size] for size in spec.shape) for spec in known}

    def close(self) -> None:
        """Free the session."""
        self._session = None
        self._run.close()


def _run_options(arena: bool) -> Any:
    import onnxruntime

    options = onnxruntime.RunOptions()
    if arena:
        # The next call is another graph's, or has another size.
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def _open_session(path: Path, weights: Path, device: torch.device, threads: int | None, arena: bool) -> Any:
    """Open a session on exactly one device; with CUDA, ONNX Runtime keeps the arithmetic of shapes on the CPU."""
    import onnxruntime

    if not path.is_file():
        raise EngineError(f"there is no ONNX file at {path}. Check the path, or build the graph again.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _LOG_FATAL_ONLY
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = arena
    # ONNX Runtime would keep a tensor's memory for the next one of its size, were that half a model later.
    options.enable_mem_reuse = not arena
    if threads is not None:
        options.intra_op_num_threads = threads
    model: str | bytes = str(path)
    if weights != path.parent:
        # ONNX Runtime takes weights from another folder only if the graph itself is in memory.
        model = path.read_bytes()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    provider = availability.PROVIDERS[device.type]
    providers: list[Any] = [provider]
    if device.type == "cuda":
        providers = [(provider, {"device_id": str(device.index)}), availability.PROVIDERS["cpu"]]
    try:
        # enable_fallback: without 0, a provider that fails is replaced by the CPU with nothing but a print.
        session = onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # the exceptions of ONNX Runtime have no base class of their own
        raise _failure(
            error,
            f"ONNX Runtime cannot load {path}: {error}. If the file or the data beside it is damaged or incomplete, "
            "build the graph again.",
        ) from error
    if session.get_providers()[0] != provider:
        raise BackendUnavailableError(
            f"{provider} could not be started for {path}: ONNX Runtime only offers "
            f"{', '.join(session.get_providers())}. Its CUDA and cuDNN libraries are probably missing or of another "
            "version: install the onnxruntime-gpu that matches torch's CUDA version, or use device 'cpu'."
        )
    return session


def _failure(error: Exception, text: str) -> EngineError:
    """Return what to raise for an error of ONNX Runtime, which has no class of its own for a lack of memory."""
    if any(sign in str(error) for sign in _OUT_OF_MEMORY):
        return OutOfMemoryError(f"there is not enough memory for ONNX Runtime: {error}")
    return EngineError(text)


def _spec(node: Any, path: Path) -> TensorSpec:
    """Translate ONNX Runtime's description of an input or output; a size without a symbol gets one of its own."""
    if node.type not in _DTYPES:
        raise EngineError(f"{node.name} in {path} is a {node.type}; supported are: {', '.join(_DTYPES)}.")
    shape = tuple(
        size if isinstance(size, int | str) else f"{node.name}.{axis}" for axis, size in enumerate(node.shape)
    )
    return TensorSpec(node.name, _DTYPES[node.type][0], shape)
