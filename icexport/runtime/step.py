"""One denoising step as a CUDA graph: ControlNet and UNet launched at once.

At batch 1 a fast GPU finishes the small kernels of a step sooner than Python can launch the next ones. diffusers' loop
calls the ControlNet and then the UNet; the first call only notes its inputs, and the second one replays the graph of
both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from engines.base import Engine
from engines.capture import CapturedCall, CudaRecorder, Recorder

_CONTROLNET = "controlnet."
_NOISE = "noise_pred"


class Deferred:
    """Residuals that are not computed yet.

    Attributes:
        inputs: inputs of the ControlNet's engine.
    """

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        self.inputs = inputs


class StepGraphs:
    """CUDA graphs of a step, recorded at the first step with each combination of shapes.

    Args:
        controlnet: engine of the ControlNet.
        unet: engine of the UNet.
        record: what records; None: CUDA graphs that share their memory.
    """

    def __init__(self, controlnet: Engine, unet: Engine, record: Recorder | None = None) -> None:
        self._controlnet = controlnet
        self._unet = unet
        self._record = record or CudaRecorder()
        self._calls: dict[tuple[str, ...] | None, CapturedCall] = {}

    def __call__(
        self, inputs: Mapping[str, Tensor], controlnet: Deferred | None, outputs: Sequence[str] | None
    ) -> dict[str, Tensor]:
        """Run a step.

        Args:
            inputs: inputs of the UNet; without the residuals if ``controlnet`` is given.
            controlnet: what the ControlNet was called with; None: the residuals are among ``inputs``.
            outputs: outputs of the UNet that are wanted; None: all.

        Returns:
            The outputs. All but ``noise_pred``, which schedulers keep, are valid until the next call.
        """
        wanted = None if outputs is None else tuple(outputs)
        if wanted not in self._calls:
            self._calls[wanted] = CapturedCall(lambda tensors: self._run(tensors, wanted), self._record)
        noted = {f"{_CONTROLNET}{name}": tensor for name, tensor in controlnet.inputs.items()} if controlnet else {}
        found = self._calls[wanted]({**inputs, **noted})
        return {**found, _NOISE: found[_NOISE].clone()}

    def _run(self, tensors: Mapping[str, Tensor], wanted: tuple[str, ...] | None) -> dict[str, Tensor]:
        inputs = {name: tensor for name, tensor in tensors.items() if not name.startswith(_CONTROLNET)}
        noted = {name.removeprefix(_CONTROLNET): t for name, t in tensors.items() if name.startswith(_CONTROLNET)}
        if noted:
            inputs |= self._controlnet(noted)
        return self._unet(inputs, wanted)
