"""The kernels as ahead-of-time plugins of classic TensorRT: PTX and launch parameters go into the plan.

TensorRT 10.9 and later let Python describe a plugin (``tensorrt.plugin``): what the result looks like, and, when an
engine is built, one kernel as PTX with its grid and its int32 arguments. The plan needs neither Python nor Triton.
``engines/kernels/<op>/plugin.py`` says both for one operator; this module translates.

Facts that shape the code, read in the bindings of 10.9 to 11.4:

* Attributes are declared as arrays of int32 or float32. That is what TensorRT's ONNX parser hands over, always with
  one axis; the bindings before 11 cannot turn them into ``int`` and ``float`` with numpy 2.4.
* The attributes come by position, all of them, in the order of the declaration.
* There is no ``autotune``: without it TensorRT takes the types of the network and plain NCHW memory. A strongly typed
  network leaves no other choice, and launch configurations come from tables (``tuning.py``).
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import GenericAlias
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engines.errors import BackendUnavailableError, EngineError
from engines.kernels.host import load_kernel
from engines.kernels.tuning import LaunchConfig

if TYPE_CHECKING:
    from engines.kernels.aot import Ptx

NAMESPACE = "icexport"
PLUGINS = ("dual_projection", "resize_group_norm_relu", "residual_mix")
"""Operators that have a plugin."""

_ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
"""Those that get PTX of their own; any other GPU takes the portable one."""

_SHARED_MEMORY = 48 * 1024
"""Bytes that a launch can have without asking the driver for more, which TensorRT is not known to do."""

_NOT_HASHED = ("check.py", "spec.py")
"""Files of this package that only say how kernels are tested and measured."""

_INTEGERS = np.ndarray[tuple[int, ...], np.dtype[np.int32]]
_FLOATS = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
_TORCH_TYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Call:
    """One node of a network, as far as its launch depends on it.

    Attributes:
        shapes: shapes of the inputs, by name. A batch that is free in the engine is None; all else is known.
        attributes: attributes of the node, by name.
        batch: number of samples, a number or TensorRT's expression of a free batch.
        usual_batch: number of samples that the launch is chosen for.
        dtype: type of every tensor.
        capability: compute capability that the launch is chosen for, 90 for 9.0.
    """

    shapes: Mapping[str, tuple[Any, ...]]
    attributes: Mapping[str, Any]
    batch: Any
    usual_batch: int
    dtype: torch.dtype
    capability: int


@dataclass(frozen=True)
class Launch:
    """How to launch a kernel.

    Attributes:
        grid: numbers of programs in x and y, numbers or expressions of a free batch.
        scalars: the kernel's int32 arguments, in its order.
        constants: the kernel's constexpr arguments, but for those in ``config``.
        config: block sizes, warps and stages.
    """

    grid: tuple[Any, Any]
    scalars: tuple[int, ...]
    constants: Mapping[str, Any]
    config: LaunchConfig


def register(module: Any, names: Sequence[str]) -> None:
    """Make plugins known to TensorRT in this process, for the GPU that torch has selected.

    What is already known stays as it is.

    Args:
        module: ``tensorrt``, 10.9 or later.
        names: names of the plugins, ``icexport::<op>`` each.

    Raises:
        EngineError: if a name is unknown.
        BackendUnavailableError: if this TensorRT has no ahead-of-time plugins, or Triton is missing.
    """
    known = {f"{NAMESPACE}::{name}": name for name in PLUGINS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise EngineError(f"there is no plugin {', '.join(unknown)}; there are: {', '.join(known)}.")
    try:
        api = importlib.import_module(f"{module.__name__}.plugin")
    except ImportError as error:
        raise BackendUnavailableError(_no_plugins(module, f"tensorrt.plugin cannot be imported: {error}")) from error
    if not hasattr(api, "aot_impl"):
        raise BackendUnavailableError(_no_plugins(module, "it has no tensorrt.plugin.aot_impl"))
    for name in dict.fromkeys(names):
        load_kernel(known[name])  # a missing Triton is an error here, not in the middle of a build
        if not hasattr(getattr(api.op, NAMESPACE, None), known[name]):
            _Plugin(api, known[name]).register()


def kernel_hash() -> str:
    """Return the SHA-256 over what shapes a kernel: this package's code and tables, and the version of Triton.

    The code that only tests and measures kernels does not count: a new test case leaves every plan as it is.

    Raises:
        BackendUnavailableError: if Triton is missing.
    """
    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:
        raise BackendUnavailableError(
            f"plugins are compiled by Triton, which cannot be imported: {error}. Run: pip install triton"
        ) from error
    folder = Path(__file__).parent
    digest = hashlib.sha256(f"triton {version}".encode())
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".json")):
        name = path.relative_to(folder).as_posix()
        if name not in _NOT_HASHED:
            content = path.read_bytes()
            digest.update(f"\n{name} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()


def choose_launch(name: str, call: Call) -> Launch:
    """Return how the plugin of an operator is to launch its kernel for one node."""
    launch: Launch = _definition(name).launch(call)
    return launch


def compile_kernel(name: str, call: Call, launch: Launch) -> Ptx:
    """Compile the kernel of an operator for one node: its attributes and the launch configuration are baked in.

    Raises:
        EngineError: if the launch does not fit the kernel, or the kernel cannot be compiled.
        BackendUnavailableError: if Triton is missing.
    """
    kernel = load_kernel(name).KERNEL
    from engines.kernels import aot  # here, because it needs Triton

    signature = aot.signature(kernel, call.dtype)
    scalars = [argument for argument, kind in signature.items() if kind == "i32"]
    pointers = [argument for argument, kind in signature.items() if kind.startswith("*")]
    if len(scalars) != len(launch.scalars) or len(pointers) != len(call.shapes) + 1:
        raise EngineError(
            f"the plugin of {name} passes {len(call.shapes) + 1} tensors and {len(launch.scalars)} numbers, but its "
            f"kernel takes {len(pointers)} and {len(scalars)}. Install icexport again."
        )
    # TensorRT's own memory, and by its rules all that is bound to an engine, is aligned to 256 bytes.
    even = [name for name, value in zip(scalars, launch.scalars, strict=True) if value % 16 == 0]
    capability = call.capability if call.capability in _ARCHITECTURES else aot.PORTABLE
    constants = {**launch.constants, **launch.config.constants}
    warps = launch.config.num_warps
    for stages in range(launch.config.num_stages, 0, -1):
        ptx = aot.compile_ptx(kernel, signature, constants, capability, warps, stages, aligned=(*pointers, *even))
        if ptx.shared_memory <= _SHARED_MEMORY:
            return ptx
    raise EngineError(
        f"{name} needs {ptx.shared_memory} bytes of shared memory, a plugin may have {_SHARED_MEMORY}. Choose smaller "
        f"blocks in tuning/{name}.json."
    )


class _Plugin:
    """One operator in the terms of ``tensorrt.plugin``."""

    def __init__(self, api: Any, name: str) -> None:
        self.api = api
        self.name = name
        arguments = getattr(torch.ops.icexport, name).default._schema.arguments
        self.inputs = [a.name for a in arguments if isinstance(a.type, torch.TensorType)]
        self.attributes = {
            a.name: _FLOATS if isinstance(a.type, torch.FloatType) else _INTEGERS
            for a in arguments
            if a.name not in self.inputs
        }

    def register(self) -> None:
        """Define the plugin; TensorRT reads the signatures of the functions, types included."""
        api, plugin_id = self.api, f"{NAMESPACE}::{self.name}"
        tensors = dict.fromkeys(self.inputs, api.TensorDesc)
        untyped = dict.fromkeys((*self.inputs, *self.attributes, "outputs", "tactic"), inspect.Parameter.empty)
        result = GenericAlias(tuple, (str, str, api.KernelLaunchParams, api.SymExprs))

        def describe(*inputs: Any, **attributes: Any) -> Any:
            return self.describe(inputs, attributes)

        def implement(*given: Any) -> Any:
            return self.implement(given[: len(self.inputs)], given[len(self.inputs) : -2])

        _set_signature(describe, {**tensors, **self.attributes}, api.TensorDesc)
        _set_signature(implement, untyped, result)
        api.register(plugin_id)(describe)
        api.aot_impl(plugin_id)(implement)

    def describe(self, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
        """Return the result's descriptor."""
        shapes = {name: tensor.shape_expr for name, tensor in zip(self.inputs, inputs, strict=True)}
        numbers = {name: value[0].item() for name, value in attributes.items()}
        return self.api.from_shape_expr(_definition(self.name).output_shape(shapes, numbers), inputs[0].dtype)

    def implement(self, inputs: Sequence[Any], attributes: Sequence[Any]) -> tuple[str, str, Any, Any]:
        """Return the name of the kernel, its PTX, grid and blocks, and its int32 arguments."""
        call = self._call(inputs, attributes)
        launch = choose_launch(self.name, call)
        ptx = compile_kernel(self.name, call, launch)
        launch_parameters = self.api.KernelLaunchParams()
        launch_parameters.grid_x, launch_parameters.grid_y = launch.grid
        launch_parameters.block_x = 32 * ptx.num_warps
        launch_parameters.shared_mem = ptx.shared_memory
        scalars = self.api.SymIntExprs.from_tuple([self.api.SymInt32(value) for value in launch.scalars])
        return ptx.name, ptx.text, launch_parameters, scalars

    def _call(self, inputs: Sequence[Any], attributes: Sequence[Any]) -> Call:
        first = inputs[0]
        names = sorted({tensor.dtype.name for tensor in inputs})
        if len(names) > 1 or names[0] not in _TORCH_TYPES:
            raise EngineError(f"{self.name} takes FLOAT, HALF or BF16 tensors of one type, got {', '.join(names)}.")
        shapes = {name: tuple(tensor.shape) for name, tensor in zip(self.inputs, inputs, strict=True)}
        free = [name for name, shape in shapes.items() if min(shape[1:], default=0) < 0]
        if free:
            raise EngineError(f"only the batch may be free in an engine with plugins, but {self.name} got {shapes}.")
        batch = first.shape[0]
        major, minor = torch.cuda.get_device_capability()
        return Call(
            {name: tuple(None if size < 0 else size for size in shape) for name, shape in shapes.items()},
            {name: value[0].item() for name, value in zip(self.attributes, attributes, strict=True)},
            first.shape_expr[0] if batch < 0 else batch,
            first.shape.opt[0] if batch < 0 else batch,
            _TORCH_TYPES[names[0]],
            10 * major + minor,
        )


def _definition(name: str) -> Any:
    return importlib.import_module(f"engines.kernels.{name}.plugin")


def _set_signature(function: Any, parameters: Mapping[str, Any], returns: Any) -> None:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    function.__signature__ = inspect.Signature(
        [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()],
        return_annotation=returns,
    )


def _no_plugins(module: Any, reason: str) -> str:
    return (
        f"{module.__name__} {module.__version__} cannot run our kernels as plugins: {reason}. "
        "Install tensorrt 10.9 or later, or build without plugins."
    )
