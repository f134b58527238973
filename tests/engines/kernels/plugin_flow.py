"""Takes plugins through TensorRT's own Python code, with the real bindings; run by test_plugins.py.

The C++ library is a stub. What it would do stands here: it creates a plugin from a node's attributes as its ONNX
parser hands them over, asks for the result's type and shape, then for the kernel and the launch.
"""

from __future__ import annotations

import importlib
import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import tensorrt_bindings as trt
import torch

from engines.kernels import plugins
from engines.kernels.aot import Ptx
from engines.kernels.plugins import Call, Launch

FREE_BATCH = 3
FLOATS = {"fp32": trt.float32, "fp16": trt.float16, "bf16": trt.bfloat16}


class Dim(trt.IDimensionExpr):  # type: ignore[misc]
    """An expression with its value at run time; only the free batch is not constant."""

    value: int
    constant: bool

    @classmethod
    def of(cls, value: int, constant: bool = True) -> Dim:
        made: Dim = cls.__new__(cls)  # there is no constructor in Python
        made.value, made.constant = value, constant
        return made


class Builder:
    """What stands for IExprBuilder."""

    def constant(self, value: int) -> Dim:
        return Dim.of(value)

    def operation(self, kind: Any, first: Dim, second: Dim) -> Dim:
        if kind != trt.DimensionOperation.PROD:
            raise NotImplementedError(str(kind))
        return Dim.of(first.value * second.value, first.constant and second.constant)


class Scalars(dict[int, int]):
    """What stands for ISymExprs."""

    nbSymExprs = 0  # noqa: N815


def dynamic(shape: list[int], kind: Any) -> Any:
    """A tensor as TensorRT describes it: -1 is free, and was 2 when the engine was tuned."""
    tensor = trt.DynamicPluginTensorDesc()
    tensor.desc.dims, tensor.desc.type, tensor.desc.format = trt.Dims(shape), kind, trt.TensorFormat.LINEAR
    tensor.min, tensor.opt, tensor.max = (trt.Dims([n if size < 0 else size for size in shape]) for n in (1, 2, 4))
    return tensor


def fields(attributes: dict[str, float]) -> Any:
    """Attributes of a node as the ONNX parser hands them over: arrays, 32 bits wide."""
    types = {int: (np.int32, trt.PluginFieldType.INT32), float: (np.float32, trt.PluginFieldType.FLOAT32)}
    kept = []
    for name, value in attributes.items():
        kind, field_kind = types[type(value)]
        kept.append((name, np.array([value], kind), field_kind))
    FIELDS.append(kept)  # the fields do not own their memory
    return trt.PluginFieldCollection([trt.PluginField(*field) for field in kept])


FIELDS: list[Any] = []


def run(api: Any, creator: Any, node: dict[str, Any]) -> dict[str, Any]:
    """One node: what TensorRT gets to know."""
    kind, name = FLOATS[node["type"]], node["name"]
    strict = trt.QuickPluginCreationRequest.STRICT_AOT
    plugin = creator.create_plugin(name, "icexport", fields(node["attributes"]), trt.TensorRTPhase.BUILD, strict)
    shapes = list(node["shapes"].values())
    types = plugin.get_output_data_types([kind] * len(shapes), [len(shape) for shape in shapes])
    inputs = [[Dim.of(FREE_BATCH if size < 0 else size, size >= 0) for size in shape] for shape in shapes]
    (result,) = plugin.get_output_shapes(inputs, [], Builder())

    result_shape = [dim.value if dim.constant else -1 for dim in result]
    tensors = [dynamic(shape, kind) for shape in (*shapes, result_shape)]
    combination = plugin.get_supported_format_combinations(tensors, len(shapes))
    plugin.set_tactic(0)
    launch, scalars = SimpleNamespace(), Scalars()
    plugin.get_launch_params(None, tensors, len(shapes), launch, scalars, Builder())
    kernel = plugin.get_kernel([t.desc for t in tensors[:-1]], [tensors[-1].desc])
    assert scalars.nbSymExprs == len(scalars)
    return {
        "types": [t == kind for t in types] + [c.type == kind for c in combination],
        "formats": [c.format == trt.TensorFormat.LINEAR for c in combination],
        "shape": [dim.value for dim in result],
        "launch": vars(launch),
        "scalars": [scalars[index] for index in range(len(scalars))],
        "kernel": [kernel[0], kernel[1].decode()],
        "constants": {key: round(value, 9) for key, value in LAUNCHES[-1].constants.items()},
    }


LAUNCHES: list[Launch] = []


def compiled(name: str, call: Call, launch: Launch) -> Ptx:
    """In place of the compiler, which has tests of its own."""
    LAUNCHES.append(launch)
    return Ptx(f"{name}_{call.dtype}_{call.capability}", "// PTX", 1024, launch.config.num_warps)


def main(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    sys.modules["tensorrt"] = trt  # as the frontend package does
    api = importlib.import_module("tensorrt_bindings.plugin")
    lib, tensor = (importlib.import_module(f"tensorrt_bindings.plugin.{name}") for name in ("_lib", "_tensor"))
    # What the frontend package hands on with a star.
    assert {"TensorDesc", "KernelLaunchParams", "SymExprs", "SymIntExprs", "SymInt32", "op"} <= set(api.__all__)
    assert {"from_shape_expr", "register", "aot_impl"} <= set(api.__all__)
    creators = {}

    def registered(name: str, namespace: str, types: Any) -> None:
        creators[name] = lib._TemplatePluginCreator(name, namespace, types)

    # What only the C++ library can make: the registry, lists of expressions, expressions of a launch.
    lib._register_plugin_creator = registered
    trt.DimsExprs = lambda length: [None] * length
    tensor.SymExprImpl = lambda expression: expression._expr.value
    torch.cuda.get_device_capability = lambda: (9, 0)
    plugins.compile_kernel = compiled

    names = [f"icexport::{name}" for name in plugins.PLUGINS]
    plugins.register(trt, names[:1])
    plugins.register(trt, names)  # the first one once more
    assert list(creators) == list(plugins.PLUGINS)
    return [run(api, creators[node["name"]], node) for node in nodes]


if __name__ == "__main__":
    found = {"version": trt.__version__, "nodes": main(json.loads(sys.argv[1]))}
    print(json.dumps(found))  # noqa: T201
