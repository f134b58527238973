"""Answers of a library that has loaded one plan: y = x + 1 for every element, and taps that are all 7."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engines.base import Availability, TensorSpec
from engines.tensorrt import engine as engine_module
from engines.tensorrt import scratch as scratch_module
from engines.tensorrt.engine import TensorRtEngine
from tests.engines.tensorrt.bindings import Library

STREAM = 4242
INPUTS = (TensorSpec("x", torch.float32, ("batch", 2, 3)), TensorSpec("step", torch.float32, ()))
OUTPUTS = (TensorSpec("y", torch.float32, ("batch", 2, 3)), TensorSpec("tap", torch.float32, ("batch", 5)))
SHAPES: dict[str, tuple[int, ...]] = {"x": (-1, 2, 3), "step": (), "y": (-1, 2, 3), "tap": (-1, 5)}

RANGE = ((1, 2, 3), (2, 2, 3), (4, 2, 3))

Triple = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def static(batch: int) -> Triple:
    """A profile of x for one batch size."""
    return ((batch, 2, 3),) * 3


def answers(
    profiles: Sequence[Triple], shapes: Mapping[str, tuple[int, ...]] = SHAPES, **other: Any
) -> dict[str, Any]:
    """What a library says about the plan, and what it does with it on the CPU."""
    names, batches, addresses = list(shapes), {}, {}

    def set_input_shape(context: Any, name: str, shape: tuple[int, ...]) -> bool:
        if name == "x":
            batches[id(context)] = shape[0]
        return True

    def set_tensor_address(context: Any, name: str, address: int) -> bool:
        addresses[id(context), name] = address
        return True

    def execute(context: Any, stream: int) -> bool:
        batch = batches[id(context)]
        _array(addresses[id(context), "y"], 6 * batch)[:] = _array(addresses[id(context), "x"], 6 * batch) + 1
        _array(addresses[id(context), "tap"], 5 * batch)[:] = 7
        return True

    def dims(thing: Any, shape: Sequence[int]) -> Any:
        return thing.library.real.Dims(shape)

    def mode(engine: Any, name: str) -> Any:
        modes = engine.library.real.TensorIOMode
        return modes.INPUT if name in ("x", "step") else modes.OUTPUT

    return {
        "ICudaEngine.num_io_tensors": len(names),
        "ICudaEngine.get_tensor_name": lambda engine, index: names[index],
        "ICudaEngine.get_tensor_mode": mode,
        "ICudaEngine.get_tensor_dtype": lambda engine, name: engine.library.real.DataType.FLOAT,
        "ICudaEngine.get_tensor_shape": lambda engine, name: dims(engine, shapes[name]),
        "ICudaEngine.get_tensor_location": lambda engine, name: engine.library.real.TensorLocation.DEVICE,
        "ICudaEngine.num_optimization_profiles": len(profiles),
        "ICudaEngine.get_tensor_profile_shape": lambda engine, name, index: [dims(engine, s) for s in profiles[index]],
        "IExecutionContext.set_input_shape": set_input_shape,
        "IExecutionContext.get_tensor_shape": lambda context, name: dims(
            context, [batches[id(context)] if size == -1 else size for size in shapes[name]]
        ),
        "IExecutionContext.update_device_memory_size_for_shapes": lambda context: 1024 * batches[id(context)],
        "IExecutionContext.set_tensor_address": set_tensor_address,
        "IExecutionContext.execute_async_v3": execute,
        "Runtime.engine_header_size": 64,
        **other,
    }


def use_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU stand in for a GPU: the engine takes its tensors, and gets a number for a stream."""

    @contextmanager
    def launch_stream(device: torch.device) -> Any:
        yield STREAM

    monkeypatch.setattr(engine_module, "launch_stream", launch_stream)
    available = Availability(True, "", "", "", ("cpu",))
    monkeypatch.setattr(engine_module.api, "check", lambda _flavour: available)


class Bench:
    """Makes engines on one double of TensorRT-RTX."""

    def __init__(self, real: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.plan = folder / "unet.plan"
        self.plan.write_bytes(b"plan" * 100)
        self.library = Library(real)
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", self.library.module)
        use_cpu(monkeypatch)

    def engine(self, profiles: Any = (RANGE,), shapes: Any = SHAPES, other: Any = None, **arguments: Any) -> Any:
        self.library.answers = answers(profiles, shapes, **(other or {}))
        self.library.calls.clear()
        given = {"inputs": INPUTS, "outputs": OUTPUTS, "flavour": "tensorrt-rtx", "device": "cpu", **arguments}
        return TensorRtEngine("unet", self.plan, **given)

    def capture(self) -> None:
        """From here on, a CUDA graph is being captured."""
        for module in (scratch_module, engine_module):
            self.monkeypatch.setattr(module, "capturing", lambda: True)


def inputs(batch: int) -> dict[str, torch.Tensor]:
    return {"x": torch.arange(6.0 * batch).reshape(batch, 2, 3), "step": torch.tensor(3.0)}


def _array(address: int, count: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))
