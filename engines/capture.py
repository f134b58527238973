"""CUDA graphs: a whole step, of any number of engine calls, launched at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from engines.errors import EngineError

Function = Callable[[dict[str, Tensor]], dict[str, Tensor]]
Recording = tuple[Callable[[], None], dict[str, Tensor]]
"""What repeats a recorded function, and the outputs that this rewrites."""
Recorder = Callable[[Function, dict[str, Tensor]], Recording]
"""Records a function on inputs that stay where they are."""

_WARM_UP_CALLS = 2


class CudaRecorder:
    """Records functions as CUDA graphs. Those of one recorder share memory: replay them in turn, on one stream."""

    def __init__(self) -> None:
        self._pool: Any = None  # torch's type for it is private

    def __call__(self, function: Function, inputs: dict[str, Tensor]) -> Recording:
        """Call the function a few times, then record it.

        Args:
            function: function to record; it must neither wait for the GPU nor read anything back.
            inputs: what it is called with. The CUDA graph reads them where they are.

        Returns:
            What replays the CUDA graph on torch's current stream, and the outputs.

        Raises:
            EngineError: if the inputs are not all on one CUDA device, or the function cannot be captured.
        """
        devices = {tensor.device for tensor in inputs.values()}
        if len(devices) != 1 or {device.type for device in devices} != {"cuda"}:
            found = ", ".join(f"{name} on {tensor.device}" for name, tensor in inputs.items()) or "no inputs"
            raise EngineError(
                f"a CUDA graph needs all inputs on one CUDA device, got {found}. Move them, or run without "
                "a CUDA graph."
            )
        with torch.cuda.device(devices.pop()):
            return self._capture(function, inputs)

    def _capture(self, function: Function, inputs: dict[str, Tensor]) -> Recording:
        current, side = torch.cuda.current_stream(), _capture_stream(torch.cuda.current_device())
        side.wait_stream(current)
        with torch.cuda.stream(side):
            # What happens only once is not to be recorded: lazy libraries, the engines' contexts and scratch memory.
            for _ in range(_WARM_UP_CALLS):
                function(inputs)
        current.wait_stream(side)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        cuda_graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(cuda_graph, pool=self._pool, stream=side):
                outputs = function(inputs)
        except RuntimeError as error:
            self._pool = None  # torch may think that it still records into it
            raise EngineError(
                f"the step cannot be captured in a CUDA graph: {error}. Something in it waits for the GPU, or takes "
                "memory that is not torch's. Run it without a CUDA graph."
            ) from error
        return cuda_graph.replay, outputs


class CapturedCall:
    """A function of tensors that runs as a CUDA graph, recorded at the first call with each combination of shapes.

    A call copies the inputs to where the CUDA graph reads them, and replays it. The outputs are memory of the CUDA
    graph: they are valid until the next call of this object, or of another one with the same recorder; clone what has
    to stay. A replay repeats the kernels of the recording, so nothing but the values in the inputs, and in other
    memory that the function reads, can change: what Python decides in the function is decided once.

    Args:
        function: takes and returns named tensors: any composition of engine calls and torch operations that does not
            wait for the GPU.
        record: a ``CudaRecorder`` to share memory with other calls, which then must run in turn; None makes one.
    """

    def __init__(self, function: Function, record: Recorder | None = None) -> None:
        self._function = function
        self._record = record or CudaRecorder()
        self._recordings: dict[object, tuple[dict[str, Tensor], Recording]] = {}

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the function.

        Args:
            inputs: tensors, all on one CUDA device. Any strides.

        Returns:
            The function's outputs, valid until the next call.

        Raises:
            EngineError: if the inputs are not on one CUDA device, or the function cannot be captured. It never runs
                without a CUDA graph instead.
        """
        key = tuple((name, tensor.dtype, tensor.shape, tensor.device) for name, tensor in sorted(inputs.items()))
        if key not in self._recordings:
            # Tensors that are made in inference mode cannot be written outside of it; leaving it turns gradients on.
            with torch.inference_mode(False), torch.no_grad():
                fixed = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in inputs.items()}
                self._recordings[key] = fixed, self._record(self._function, fixed)
        fixed, (replay, outputs) = self._recordings[key]
        for name, tensor in inputs.items():
            fixed[name].copy_(tensor)
        replay()
        return dict(outputs)

    def close(self) -> None:
        """Free the CUDA graphs and their memory. The next call records again."""
        self._recordings.clear()


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """Return one stream for all captures: torch reuses a CUDA graph's memory only on the stream of its capture."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
