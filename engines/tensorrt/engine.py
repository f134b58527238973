"""Runs a plan of TensorRT or TensorRT-RTX on the memory and the stream of torch."""

from __future__ import annotations

import functools
import logging
import mmap
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines import registry
from engines.base import TensorSpec, as_device, check_inputs, require_device, select_outputs
from engines.errors import EngineError, ShapeError
from engines.tensorrt import api
from engines.tensorrt.scratch import Scratch, capturing, launch_stream

logger = logging.getLogger(__name__)

_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
_ALIGNMENT = 256
_KEPT_MESSAGES = 8
_LISTED_INPUTS = 3

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Range:
    """Shapes of one input that a profile allows, ends included."""

    low: Shape
    high: Shape

    def __contains__(self, shape: Shape) -> bool:
        return all(low <= size <= high for low, size, high in zip(self.low, shape, self.high, strict=True))

    def __str__(self) -> str:
        ends = zip(self.low, self.high, strict=True)
        return f"[{', '.join(str(low) if low == high else f'{low}..{high}' for low, high in ends)}]"

    @property
    def width(self) -> int:
        return sum(self.high) - sum(self.low)


@dataclass
class _Run:
    """What all calls with the same input shapes share.

    Attributes:
        context: Execution context of the library, with profile and input shapes set.
        shapes: Of the outputs, in the order of the engine's specs.
        scratch_bytes: Working memory that the context needs.
        address: Of the working memory that it was given last.
    """

    context: Any
    shapes: tuple[Shape, ...]
    scratch_bytes: int
    address: int | None = None


class TensorRtEngine:
    """Runs a TensorRT plan.

    Inputs are read from, and outputs written to, the memory of torch tensors. A call queues the work on torch's
    current stream and returns. Nothing waits for the GPU, so a call can be captured in a CUDA graph
    (``engines.capture.CapturedCall``), after one ordinary call with the same shapes. Every new combination of input
    shapes makes an execution context, the state that a captured graph relies on; contexts share their working memory.
    An engine must not be called from two threads at once.

    Args:
        name: Of the graph.
        plan: File with the serialised engine.
        inputs: Specs of the graph's inputs; the plan must have exactly these.
        outputs: Specs of the graph's outputs, likewise.
        flavour: ``"tensorrt"`` or ``"tensorrt-rtx"``: the library that made the plan.
        device: ``"cuda"`` or ``"cuda:<i>"``.
        scratch: Working memory, shared by engines that run one after the other; None makes one for this engine.
        runtime_cache: File in which TensorRT-RTX keeps the kernels that it compiles for this GPU, so that the next
            process need not; made if missing. None keeps nothing. TensorRT compiles none and leaves it alone.

    Raises:
        BackendUnavailableError: If the library or the device cannot be used.
        EngineError: If the plan is missing, damaged, or was made for another GPU, version or graph; with the reasons
            that the library gives.
    """

    def __init__(
        self,
        name: str,
        plan: Path,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        flavour: str,
        device: str | torch.device = "cuda",
        scratch: Scratch | None = None,
        runtime_cache: Path | None = None,
    ) -> None:
        self.name = name
        self.backend = flavour
        self.device = as_device(device)
        self.plan = Path(plan)
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        require_device(flavour, registry.check(flavour), self.device.type)
        self._scratch = scratch or Scratch(self.device)
        if self._scratch.device != self.device:
            raise EngineError(
                f"graph {name!r} is to run on {self.device}, but its scratch memory is on {self._scratch.device}. "
                f"Make it with Scratch({str(self.device)!r})."
            )
        self._module = api.load(flavour)
        self._errors: deque[str] = deque(maxlen=_KEPT_MESSAGES)
        self._logger = api.logger(self._module, functools.partial(_log, name, self._errors))
        self._runtime_cache = runtime_cache
        self._kernels: Any | None = None
        self._runs: dict[tuple[Shape, ...], _Run] = {}
        with launch_stream(self.device):
            self._runtime: Any | None = self._module.Runtime(self._logger)
            self._engine: Any | None = self._load(self._runtime)
            self._check_tensors(self._engine)
            self._profiles = [self._ranges(self._engine, i) for i in range(self._engine.num_optimization_profiles)]
            self._options = self._context_options(self._engine)

    def __call__(self, inputs: Mapping[str, Tensor], outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Queue one run of the graph on torch's current stream; see ``engines.Engine``.

        Raises:
            ShapeError: Also if the shapes are outside of every profile of the plan; the message lists these.
        """
        if self._engine is None:
            raise EngineError(f"graph {self.name!r} ({self.plan}) was closed and cannot be run. Build a new engine.")
        names = select_outputs(self, outputs)
        tensors = [_bindable(tensor) for tensor in check_inputs(self, inputs)]
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        with launch_stream(self.device) as stream:
            run = self._runs.get(shapes) or self._prepare(self._engine, shapes, stream)
            # Also what nobody wants gets memory of its own: the plan may read its outputs back in later layers.
            results = [
                torch.empty(shape, dtype=spec.dtype, device=self.device)
                for spec, shape in zip(self.outputs, run.shapes, strict=True)
            ]
            self._enqueue(run, zip((*self.inputs, *self.outputs), (*tensors, *results), strict=True), stream)
            if shapes not in self._runs:
                self._runs[shapes] = run
                self._save_kernels()
        computed = {spec.name: result for spec, result in zip(self.outputs, results, strict=True)}
        return {name: computed[name] for name in names}

    def close(self) -> None:
        """Wait for the GPU and free the plan; CUDA graphs with calls of this engine cannot be replayed afterwards."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(self.device)
        # Contexts before the engine, and the engine before the runtime that made it.
        self._runs.clear()
        self._options = self._kernels = None
        self._engine = None
        self._runtime = None

    def _failure(self, what: str, fix: str) -> EngineError:
        """The error for a call to the library that failed, with what it logged."""
        reasons = "; ".join(dict.fromkeys(self._errors)) or f"{self._module.__name__} gave no reason"
        self._errors.clear()
        return EngineError(f"graph {self.name!r} ({self.plan}): {what}: {reasons}. {fix}")

    def _load(self, runtime: Any) -> Any:
        """Deserialise the plan."""
        engine = None
        try:
            with (
                self.plan.open("rb") as file,
                # Mapped, for a plan has gigabytes and the library copies what it needs.
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
            ):
                engine = runtime.deserialize_cuda_engine(data)
                if engine is None and hasattr(runtime, "get_engine_validity"):
                    self._errors.append(_validity(self._module, runtime, data))
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            self._errors.append(str(error))
        if engine is None:
            raise self._failure(
                f"{self._module.__name__} {self._module.__version__} cannot load the plan",
                "Unless it says that memory is missing, build the plan again with this version for this GPU: "
                f"icexport build --force --backend {self.backend}",
            )
        return engine

    def _check_tensors(self, engine: Any) -> None:
        """Refuse a plan whose inputs and outputs are not those of the graph."""
        module = self._module
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name) for name in names}
        wanted = dict.fromkeys([spec.name for spec in self.inputs], module.TensorIOMode.INPUT)
        wanted |= dict.fromkeys([spec.name for spec in self.outputs], module.TensorIOMode.OUTPUT)
        problems = [
            f"it has no {mode.name.lower()} {name}" for name, mode in wanted.items() if modes.get(name) != mode
        ]
        problems += [f"the graph has no {modes[name].name.lower()} {name}" for name in names if name not in wanted]
        for spec in (*self.inputs, *self.outputs):
            if spec.name not in modes:
                continue
            dtype, shape = engine.get_tensor_dtype(spec.name).name, tuple(engine.get_tensor_shape(spec.name))
            if _DTYPES.get(dtype) != spec.dtype or not _same_shape(spec.shape, shape):
                problems.append(f"{spec} is {dtype} {list(shape)} in it")
            if engine.get_tensor_location(spec.name) != module.TensorLocation.DEVICE:
                problems.append(f"{spec} would have to lie in host memory, because shapes depend on its values")
        if problems:
            raise EngineError(
                f"the plan {self.plan} is not one of graph {self.name!r}: {'; '.join(problems)}. Build it again from "
                f"the graph: icexport build --force --backend {self.backend}"
            )

    def _ranges(self, engine: Any, profile: int) -> dict[str, _Range]:
        """Shapes that a profile allows for each input."""
        ranges = {}
        for spec in self.inputs:
            low = high = tuple(engine.get_tensor_shape(spec.name))
            if -1 in low:
                low, _, high = map(tuple, engine.get_tensor_profile_shape(spec.name, profile))
            ranges[spec.name] = _Range(low, high)
        return ranges

    def _context_options(self, engine: Any) -> Any:
        """What execution contexts are made with: working memory from outside; for TensorRT-RTX, also its compiler."""
        module = self._module
        user_managed = module.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(module, "IRuntimeCache"):
            return user_managed
        options = engine.create_runtime_config()
        options.set_execution_context_allocation_strategy(user_managed)
        # CUDA graphs are captured from outside, over several engines. With the lazy strategy such a graph would keep
        # the fallback kernels for ever, and equal calls would differ before and after these are replaced.
        specialisation = module.DynamicShapesKernelSpecializationStrategy.EAGER
        options.dynamic_shapes_kernel_specialization_strategy = specialisation
        options.cuda_graph_strategy = module.CudaGraphStrategy.DISABLED
        if self._runtime_cache is not None:
            self._kernels = options.create_runtime_cache()
            path = self._runtime_cache
            if path.is_file() and not self._kernels.deserialize(path.read_bytes()):
                logger.info("%s is of another GPU, driver or version: its kernels are compiled again", path)
            if not options.set_runtime_cache(self._kernels):
                raise self._failure("the runtime cache was refused", "Run without it: runtime_cache=None.")
        return options

    def _save_kernels(self) -> None:
        """Write what TensorRT-RTX has compiled so far to the runtime cache."""
        if self._kernels is None or self._runtime_cache is None:
            return
        path = self._runtime_cache
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(self._kernels.serialize())
            temporary.replace(path)
        except OSError as error:
            raise EngineError(
                f"the kernels of graph {self.name!r} cannot be written to {path}: {error}. Make its folder writable, "
                "choose another one, or run without: runtime_cache=None."
            ) from error

    def _profile(self, shapes: Sequence[Shape]) -> int:
        """Index of the narrowest profile that allows the shapes: it is tuned best for them."""
        given = {spec.name: shape for spec, shape in zip(self.inputs, shapes, strict=True)}
        fitting = {
            sum(allowed.width for allowed in ranges.values()): index
            for index, ranges in enumerate(self._profiles)
            if all(shape in ranges[name] for name, shape in given.items())
        }
        if fitting:
            return fitting[min(fitting)]
        names = [name for name in given if any(given[name] not in ranges[name] for ranges in self._profiles)]
        shown, hidden = names[:_LISTED_INPUTS], len(names[_LISTED_INPUTS:])
        got = ", ".join(f"{name} {list(given[name])}" for name in shown) + (f" and {hidden} more" if hidden else "")
        allowed = " or ".join(", ".join(f"{name} {ranges[name]}" for name in shown) for ranges in self._profiles)
        raise ShapeError(
            f"the plan {self.plan} of graph {self.name!r} was not built for {got}; it takes {allowed}. Use one, "
            "or build for others: icexport build --batch-size N --height N --width N, where N may be min:opt:max."
        )

    def _prepare(self, engine: Any, shapes: Sequence[Shape], stream: int) -> _Run:
        """Make the execution context for these input shapes."""
        profile = self._profile(shapes)
        context = engine.create_execution_context(self._options)
        if context is None:
            raise self._failure("no execution context could be made", "Probably the GPU has too little free memory.")
        fix = f"Build the plan again for such sizes: icexport build --force --backend {self.backend}"
        if not context.set_optimization_profile_async(profile, stream):
            raise self._failure(f"profile {profile} was refused", fix)
        for spec, shape in zip(self.inputs, shapes, strict=True):
            if not context.set_input_shape(spec.name, shape):
                raise self._failure(f"shape {list(shape)} of {spec} was refused", fix)
        results = tuple(tuple(context.get_tensor_shape(spec.name)) for spec in self.outputs)
        if any(size < 0 for shape in results for size in shape):
            raise self._failure(f"from these inputs the shapes of the outputs do not follow: {results}", fix)
        return _Run(context, results, context.update_device_memory_size_for_shapes())

    def _enqueue(self, run: _Run, tensors: Iterable[tuple[TensorSpec, Tensor]], stream: int) -> None:
        """Bind the memory and queue the kernels."""
        context = run.context
        fix = f"If memory is missing, use a smaller size; else icexport build --force --backend {self.backend}"
        # Only TensorRT-RTX can tell beforehand.
        if hasattr(context, "is_stream_capturable") and capturing() and not context.is_stream_capturable(stream):
            raise self._failure("the plan cannot be captured in a CUDA graph", fix)
        address = self._scratch.address(run.scratch_bytes)
        if address != run.address:
            context.set_device_memory(address, run.scratch_bytes)
            run.address = address
        for spec, tensor in tensors:
            if not context.set_tensor_address(spec.name, tensor.data_ptr()):
                raise self._failure(f"the memory of {spec} was refused", fix)
        if not context.execute_async_v3(stream):
            raise self._failure("the run failed", fix)


def _log(name: str, errors: deque[str], severity: str, text: str) -> None:
    """Take a message of the library. Errors are kept for the exception, which is what says them to the user."""
    if severity in ("ERROR", "INTERNAL_ERROR"):
        errors.append(text)
    logger.log(logging.WARNING if severity == "WARNING" else logging.DEBUG, "%s: %s", name, text)


def _bindable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if TensorRT cannot read it in place: strided, or a view that starts at an odd address."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def _same_shape(spec: Sequence[int | str], plan: Shape) -> bool:
    """Whether a plan's shape (-1: free) can be that of a spec; a plan may fix what the graph leaves free."""
    return len(spec) == len(plan) and all(
        isinstance(want, str) or got in (want, -1) for want, got in zip(spec, plan, strict=True)
    )


def _validity(module: Any, runtime: Any, data: mmap.mmap) -> str:
    """What TensorRT-RTX finds in the header of a plan that it cannot load."""
    if len(data) < runtime.engine_header_size:
        return f"the file has {len(data)} bytes, fewer than the header of a plan"
    validity, diagnostics = runtime.get_engine_validity(data)
    found = [name for name, bit in module.EngineInvalidityDiagnostics.__members__.items() if diagnostics & int(bit)]
    return " ".join(["its header is", validity.name, *found])
