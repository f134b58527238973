"""A graph: a module that becomes one ONNX file, with its inputs and outputs described."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from engines.base import TensorSpec
from engines.torch_eager import TorchEngine

TIMESTEP = "timestep"
"""The input that is float32 in every precision: see `icexport.graphs.stable_diffusion`."""

_SHAPE = re.compile(r"(?:(\d+)\*)?([a-z_]\w*)")


@dataclass(frozen=True)
class Graph:
    """A module that becomes one ONNX file.

    Attributes:
        name: file stem, as in ``graphs/<name>.onnx``.
        module: takes the tensors of ``inputs`` in order and returns those of ``outputs`` as a tuple, in order.
        inputs: names, dtypes and shapes; a string in a shape is a symbol, ``"4*h"`` four times the symbol ``h``.
        outputs: likewise.
    """

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def cast(self, dtype: torch.dtype) -> Graph:
        """A copy in another precision; the timestep stays float32, as everywhere."""

        def specs(side: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
            return tuple(
                replace(spec, dtype=dtype) if spec.dtype.is_floating_point and spec.name != TIMESTEP else spec
                for spec in side
            )

        return Graph(self.name, copy.deepcopy(self.module).to(dtype), specs(self.inputs), specs(self.outputs))

    def engine(self) -> TorchEngine:
        """Eager PyTorch on the module itself, on the CPU."""
        return TorchEngine(self.name, self.module, self.inputs, self.outputs)


def size_of(dimension: int | str, symbols: Mapping[str, int]) -> int:
    """The value of one dimension of a ``TensorSpec``: ``"4*h"`` with ``{"h": 16}`` is 64."""
    if isinstance(dimension, int):
        return dimension
    match = _SHAPE.fullmatch(dimension)
    if not match:
        raise ValueError(f"not a dimension: {dimension!r}")
    return int(match[1] or 1) * symbols[match[2]]


def example_inputs(
    specs: tuple[TensorSpec, ...], symbols: Mapping[str, int], seed: int = 0
) -> dict[str, torch.Tensor]:
    """Seeded inputs of the given sizes: standard normal floats, small integers, timestep 500."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for spec in specs:
        shape = tuple(size_of(d, symbols) for d in spec.shape)
        if spec.name == TIMESTEP:
            inputs[spec.name] = torch.tensor(500.0, dtype=spec.dtype)
        elif spec.dtype == torch.int64:
            inputs[spec.name] = torch.randint(0, 2 if shape == () else 100, shape, generator=generator)
        else:
            inputs[spec.name] = torch.randn(shape, generator=generator).to(spec.dtype)
    return inputs


def describe(spec: TensorSpec) -> dict[str, Any]:
    """A ``TensorSpec`` as the manifest holds it."""
    return {"name": spec.name, "dtype": str(spec.dtype).removeprefix("torch."), "shape": list(spec.shape)}


def specs(described: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    """The inverse of ``manifest.describe``."""
    return tuple(TensorSpec(d["name"], getattr(torch, d["dtype"]), tuple(d["shape"])) for d in described)
