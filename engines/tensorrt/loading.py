"""From a plan's file to the library's engine, and whether that is the engine of the graph."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from engines.base import TensorSpec
from engines.tensorrt.complaints import Complaints

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


def load_plan(module: Any, runtime: Any, plan: Path, complaints: Complaints, flavour: str) -> Any:
    """Deserialise a plan.

    Args:
        module: the TensorRT library.
        runtime: ``Runtime`` of the library.
        plan: the plan's file.
        complaints: what the library says about the plan.
        flavour: key of ``engines.tensorrt.api.FLAVOURS``.

    Returns:
        The ``ICudaEngine``.

    Raises:
        EngineError: if the file cannot be read or the library does not load it; with the library's reasons.
    """
    engine = None
    try:
        with (
            plan.open("rb") as file,
            # Mapped, for a plan has gigabytes and the library copies what it needs.
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            engine = runtime.deserialize_cuda_engine(data)
            if engine is None and hasattr(runtime, "get_engine_validity"):
                complaints.add(_validity(module, runtime, data))
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        complaints.add(str(error))
    if engine is None:
        raise complaints.failure(
            f"{module.__name__} {module.__version__} cannot load the plan",
            "Unless it says that memory is missing, build the plan again with this version for this GPU: "
            f"icexport build --force --backend {flavour}",
        )
    return engine


def misfits(module: Any, engine: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Iterator[str]:
    """Yield what the inputs and outputs of an engine have that those of the graph have not, and the other way round.

    Args:
        module: the TensorRT library.
        engine: ``ICudaEngine``.
        inputs: specs of the graph's inputs.
        outputs: specs of the graph's outputs.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    modes = {name: engine.get_tensor_mode(name) for name in names}
    wanted = dict.fromkeys([spec.name for spec in inputs], module.TensorIOMode.INPUT)
    wanted |= dict.fromkeys([spec.name for spec in outputs], module.TensorIOMode.OUTPUT)
    yield from (f"it has no {mode.name.lower()} {name}" for name, mode in wanted.items() if modes.get(name) != mode)
    yield from (f"the graph has no {modes[name].name.lower()} {name}" for name in names if name not in wanted)
    for spec in (*inputs, *outputs):
        if spec.name not in modes:
            continue
        dtype, shape = engine.get_tensor_dtype(spec.name).name, tuple(engine.get_tensor_shape(spec.name))
        if _DTYPES.get(dtype) != spec.dtype or not _same_shape(spec.shape, shape):
            yield f"{spec} is {dtype} {list(shape)} in it"
        if engine.get_tensor_location(spec.name) != module.TensorLocation.DEVICE:
            yield f"{spec} would have to lie in host memory, because shapes depend on its values"


def _same_shape(spec: Sequence[int | str], plan: tuple[int, ...]) -> bool:
    """Tell whether a plan's shape (-1: free) can be that of a spec; a plan may fix what the graph leaves free."""
    return len(spec) == len(plan) and all(
        isinstance(want, str) or got in (want, -1) for want, got in zip(spec, plan, strict=True)
    )


def _validity(module: Any, runtime: Any, data: mmap.mmap) -> str:
    """Return what TensorRT-RTX finds in the header of a plan that it cannot load."""
    if len(data) < runtime.engine_header_size:
        return f"the file has {len(data)} bytes, fewer than the header of a plan"
    validity, diagnostics = runtime.get_engine_validity(data)
    found = [name for name, bit in module.EngineInvalidityDiagnostics.__members__.items() if diagnostics & int(bit)]
    return " ".join(["its header is", validity.name, *found])
