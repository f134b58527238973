"""A graph: a module that becomes one ONNX file, with its inputs and outputs described."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from engines.base import TensorSpec
from engines.torch_eager import TorchEngine
from icexport.graphs.shapes import TensorInfo, size_of

TIMESTEP = "timestep"
"""The input that is float32 in every precision: see `icexport.graphs.stable_diffusion`."""


@dataclass(frozen=True)
class Graph:
    """A module that becomes one ONNX file.

    Attributes:
        name: file stem, as in ``graphs/<name>.onnx``.
        module: takes the tensors of ``inputs`` in order and returns those of ``outputs`` as a tuple, in order.
        inputs: names, dtypes and shapes; a string in a shape is a symbol, ``"4*rows"`` four times the symbol ``rows``.
        outputs: names, dtypes and shapes, likewise.
    """

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def cast(self, dtype: torch.dtype) -> Graph:
        """Return a copy in another precision; the timestep stays float32, as everywhere."""

        def specs(side: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
            return tuple(
                replace(spec, dtype=dtype) if spec.dtype.is_floating_point and spec.name != TIMESTEP else spec
                for spec in side
            )

        # Cast on the way, tensor by tensor: a whole copy in the old precision would double the memory.
        cast: dict[int, object] = {}
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            lower = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach().clone()
            is_parameter = isinstance(tensor, nn.Parameter)
            cast[id(tensor)] = nn.Parameter(lower, requires_grad=False) if is_parameter else lower
        module = copy.deepcopy(self.module, cast)
        return Graph(self.name, module, specs(self.inputs), specs(self.outputs))

    def with_free_axis(self, name: str, axis: int, symbol: str) -> Graph:
        """Return the same module with one axis of an input given by a symbol; unchanged if it has no such input."""

        def free(spec: TensorSpec) -> TensorSpec:
            shape = (*spec.shape[:axis], symbol, *spec.shape[axis + 1 :])
            return replace(spec, shape=shape) if spec.name == name else spec

        return replace(self, inputs=tuple(map(free, self.inputs)))

    def engine(self) -> TorchEngine:
        """Make an engine that runs the module itself in eager PyTorch, on the CPU."""
        return TorchEngine(self.name, self.module, self.inputs, self.outputs)


def example_inputs(
    specs: tuple[TensorSpec, ...], symbols: Mapping[str, int], seed: int = 0
) -> dict[str, torch.Tensor]:
    """Return seeded inputs of the given sizes: standard normal floats, small integers, timestep 500."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for spec in specs:
        shape = tuple(size_of(d, symbols) for d in spec.shape)
        if spec.name == TIMESTEP:
            inputs[spec.name] = torch.full(shape, 500.0, dtype=spec.dtype)
        elif spec.dtype == torch.int64:
            inputs[spec.name] = torch.randint(0, 2 if shape == () else 100, shape, generator=generator)
        else:
            inputs[spec.name] = torch.randn(shape, generator=generator).to(spec.dtype)
    return inputs


def describe(specs: Iterable[TensorSpec]) -> tuple[TensorInfo, ...]:
    """Return inputs or outputs as a manifest holds them."""
    return tuple(TensorInfo(spec.name, str(spec.dtype).removeprefix("torch."), spec.shape) for spec in specs)


def specs(described: Iterable[TensorInfo]) -> tuple[TensorSpec, ...]:
    """Return the inverse of ``describe``."""
    return tuple(TensorSpec(info.name, getattr(torch, info.dtype), info.shape) for info in described)
