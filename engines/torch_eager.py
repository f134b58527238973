"""Eager PyTorch: the reference that every other backend is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from engines.base import Availability, TensorSpec, as_device, check_inputs, select_outputs
from engines.errors import EngineError


def check() -> Availability:
    """Return which devices this torch can use."""
    version = str(torch.__version__)
    if torch.cuda.is_available():
        return Availability(True, version, "", "", ("cpu", "cuda"))
    return Availability(
        True,
        version,
        f"torch {version} sees no CUDA device",
        "For a GPU, install a CUDA build of torch and check the driver with nvidia-smi",
        ("cpu",),
    )


class TorchEngine:
    """Runs an ``nn.Module`` under ``torch.inference_mode``.

    Args:
        name: name of the graph.
        module: module called with the inputs by position, in the order of ``inputs``; returns a tuple of tensors in
            the order of ``outputs``. Put into evaluation mode, and not copied.
        inputs: specs of the inputs.
        outputs: specs of the outputs.
        device: device where the module's parameters and buffers already are.

    Raises:
        EngineError: if a parameter or buffer is on another device.
    """

    backend = "torch"

    def __init__(
        self,
        name: str,
        module: nn.Module,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        device: str | torch.device = "cpu",
    ) -> None:
        self.name = name
        self.device = as_device(device)
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        found = {str(tensor.device) for tensor in chain(module.parameters(), module.buffers())} - {str(self.device)}
        if found:
            raise EngineError(
                f"graph {name!r} is to run on {self.device}, but has weights on {', '.join(sorted(found))}. "
                f"Call module.to({str(self.device)!r}) first."
            )
        self._module: nn.Module | None = module.eval()

    def __call__(self, inputs: Mapping[str, Tensor], outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Run the module once; see ``engines.Engine``. Outputs are inference tensors: autograd cannot use them."""
        if self._module is None:
            raise EngineError(f"graph {self.name!r} was closed and cannot be run. Build a new engine.")
        names = select_outputs(self, outputs)
        tensors = check_inputs(self, inputs)
        with torch.inference_mode():
            results = self._module(*tensors)
        if not isinstance(results, tuple) or len(results) != len(self.outputs):
            got = f"{len(results)} values" if isinstance(results, tuple) else type(results).__name__
            raise EngineError(
                f"the module of graph {self.name!r} returned {got}, expected a tuple of {len(self.outputs)}: "
                f"{', '.join(spec.name for spec in self.outputs)}."
            )
        computed = {spec.name: result for spec, result in zip(self.outputs, results, strict=True)}
        return {name: computed[name] for name in names}

    def close(self) -> None:
        """Let go of the module."""
        self._module = None
