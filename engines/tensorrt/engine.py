"""Runs a plan of TensorRT or TensorRT-RTX on the memory and the stream of torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.base import TensorSpec, as_device, check_inputs, require_device, select_outputs
from engines.errors import EngineError
from engines.tensorrt import api
from engines.tensorrt.complaints import Complaints
from engines.tensorrt.kernel_cache import KernelCache
from engines.tensorrt.loading import load_plan, misfits
from engines.tensorrt.profiles import Shape, choose_profile, read_profiles
from engines.tensorrt.scratch import Scratch, capturing, launch_stream

_ALIGNMENT = 256


@dataclass
class _Run:
    """What all calls with the same input shapes share.

    Attributes:
        context: execution context of the library, with profile and input shapes set.
        shapes: shapes of the outputs, in the order of the engine's specs.
        scratch_bytes: size of the working memory that the context needs.
        address: address of the working memory that the context was given last.
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
    shapes makes an execution context, the state that a CUDA graph relies on; contexts share their working memory.
    An engine must not be called from two threads at once.

    Args:
        name: name of the graph, used in messages.
        plan: file with the serialised engine.
        inputs: specs of the graph's inputs; the plan must have exactly these.
        outputs: specs of the graph's outputs, likewise.
        flavour: ``"tensorrt"`` or ``"tensorrt-rtx"``: the library that made the plan.
        device: ``"cuda"`` or ``"cuda:<i>"``.
        scratch: working memory, shared by engines that run one after the other; None makes one for this engine.
        runtime_cache: file in which TensorRT-RTX keeps the kernels that it compiles for this GPU, so that the next
            process need not; made if missing. None keeps nothing. TensorRT compiles none and leaves it alone.

    Raises:
        BackendUnavailableError: if the library or the device cannot be used.
        EngineError: if the plan is missing, damaged, or was made for another GPU, version or graph; with the reasons
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
        require_device(flavour, api.check(flavour), self.device.type)
        self._scratch = scratch or Scratch(self.device)
        if self._scratch.device != self.device:
            raise EngineError(
                f"graph {name!r} is to run on {self.device}, but its scratch memory is on {self._scratch.device}. "
                f"Make it with Scratch({str(self.device)!r})."
            )
        self._module = api.load(flavour)
        self._complaints = Complaints(name, self.plan, self._module.__name__)
        self._logger = api.logger(self._module, self._complaints.note)
        self._kernels: KernelCache | None = None
        self._runs: dict[tuple[Shape, ...], _Run] = {}
        with launch_stream(self.device):
            self._runtime: Any | None = self._module.Runtime(self._logger)
            self._engine: Any | None = load_plan(self._module, self._runtime, self.plan, self._complaints, flavour)
            problems = list(misfits(self._module, self._engine, self.inputs, self.outputs))
            if problems:
                raise EngineError(
                    f"the plan {self.plan} is not one of graph {name!r}: {'; '.join(problems)}. Build it again from "
                    f"the graph: icexport build --force --backend {flavour}"
                )
            self._profiles = read_profiles(self._engine, self.inputs)
            self._options = self._context_options(self._engine, runtime_cache)

    def __call__(self, inputs: Mapping[str, Tensor], outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Queue one run of the graph on torch's current stream; see ``engines.Engine``.

        Raises:
            ShapeError: also if the shapes are outside of every profile of the plan; the message lists these.
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
                if self._kernels is not None:
                    self._kernels.save()
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

    def _context_options(self, engine: Any, runtime_cache: Path | None) -> Any:
        """Make the options of execution contexts: memory from outside; for TensorRT-RTX, also its compiler."""
        module = self._module
        user_managed = module.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(module, "IRuntimeCache"):
            return user_managed
        options = engine.create_runtime_config()
        options.set_execution_context_allocation_strategy(user_managed)
        # CUDA graphs are captured from outside, over several engines. With the lazy strategy they would keep
        # the fallback kernels for ever, and equal calls would differ before and after these are replaced.
        specialisation = module.DynamicShapesKernelSpecializationStrategy.EAGER
        options.dynamic_shapes_kernel_specialization_strategy = specialisation
        options.cuda_graph_strategy = module.CudaGraphStrategy.DISABLED
        if runtime_cache is not None:
            self._kernels = KernelCache(runtime_cache, options, self._complaints)
        return options

    def _prepare(self, engine: Any, shapes: Sequence[Shape], stream: int) -> _Run:
        """Make the execution context for these input shapes."""
        given = {spec.name: shape for spec, shape in zip(self.inputs, shapes, strict=True)}
        profile = choose_profile(self._profiles, given, f"the plan {self.plan} of graph {self.name!r}")
        context = engine.create_execution_context(self._options)
        if context is None:
            raise self._complaints.failure(
                "no execution context could be made", "Probably the GPU has too little free memory."
            )
        fix = f"Build the plan again for such sizes: icexport build --force --backend {self.backend}"
        if not context.set_optimization_profile_async(profile, stream):
            raise self._complaints.failure(f"profile {profile} was refused", fix)
        for spec, shape in zip(self.inputs, shapes, strict=True):
            if not context.set_input_shape(spec.name, shape):
                raise self._complaints.failure(f"shape {list(shape)} of {spec} was refused", fix)
        results = tuple(tuple(context.get_tensor_shape(spec.name)) for spec in self.outputs)
        if any(size < 0 for shape in results for size in shape):
            raise self._complaints.failure(
                f"from these inputs the shapes of the outputs do not follow: {results}", fix
            )
        return _Run(context, results, context.update_device_memory_size_for_shapes())

    def _enqueue(self, run: _Run, tensors: Iterable[tuple[TensorSpec, Tensor]], stream: int) -> None:
        """Bind the memory and queue the kernels."""
        context = run.context
        fix = f"If memory is missing, use a smaller size; else icexport build --force --backend {self.backend}"
        # Only TensorRT-RTX can tell beforehand.
        if hasattr(context, "is_stream_capturable") and capturing() and not context.is_stream_capturable(stream):
            raise self._complaints.failure("the plan cannot be captured in a CUDA graph", fix)
        address = self._scratch.address(run.scratch_bytes)
        if address != run.address:
            context.set_device_memory(address, run.scratch_bytes)
            run.address = address
        for spec, tensor in tensors:
            if not context.set_tensor_address(spec.name, tensor.data_ptr()):
                raise self._complaints.failure(f"the memory of {spec} was refused", fix)
        if not context.execute_async_v3(stream):
            raise self._complaints.failure("the run failed", fix)


def _bindable(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy if TensorRT cannot read it in place: strided, or a view at an odd address."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()
