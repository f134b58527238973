"""Ahead-of-time compilation: a Triton kernel becomes PTX that a TensorRT plugin can launch. No GPU is needed.

Needs Triton. A plugin passes the kernel exactly its inputs, then int32 scalars, then outputs. Triton appends pointers
to scratch memory, which these kernels do not use: they are taken out of the signature.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engines.errors import EngineError
from engines.kernels.tuning import compiler_options

PORTABLE = 80
"""Compute capability whose PTX every later GPU can take; that of 90 and above is for one architecture only."""

_WARP = 32
# The oldest PTX that has the instructions of the architecture: a driver refuses PTX that is newer than itself.
_PTX_VERSION, _BLACKWELL, _BLACKWELL_PTX_VERSION = 80, 100, 87
_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


@dataclass(frozen=True)
class Ptx:
    """One compiled kernel.

    Attributes:
        name: name of the entry.
        text: PTX code; its entry has the kernel's arguments without the constexprs, in order.
        shared_memory: dynamic shared memory of a program in bytes, to be requested at the launch.
        num_warps: number of warps of a program; a launch has 32 threads for each.
    """

    name: str
    text: str
    shared_memory: int
    num_warps: int


def signature(kernel: Any, dtype: torch.dtype) -> dict[str, str]:
    """Return Triton's types of a kernel's arguments: pointers (``*_ptr``) to one dtype, int32 scalars, constexprs.

    Raises:
        ValueError: if the kernels do not take the dtype.
    """
    if dtype not in _TYPES:
        raise ValueError(f"{kernel.__name__} is {dtype}, expected one of {', '.join(map(str, _TYPES))}.")
    return {
        parameter.name: "constexpr"
        if parameter.is_constexpr
        else _TYPES[dtype]
        if parameter.name.endswith("_ptr")
        else "i32"
        for parameter in kernel.params
    }


def compile_ptx(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    capability: int,
    num_warps: int,
    num_stages: int,
    aligned: Collection[str] = (),
) -> Ptx:
    """Compile a kernel for one architecture.

    Args:
        kernel: the ``triton.jit`` function.
        signature: argument -> Triton type, in order; see ``signature``.
        constexprs: value of every argument of type ``constexpr``.
        capability: compute capability of the GPU, 90 for 9.0; ``PORTABLE`` for PTX that later ones take as well.
        num_warps: number of warps of a program.
        num_stages: number of stages of Triton's software pipeline.
        aligned: arguments that are always multiples of 16: pointers in bytes, scalars in value. Without them memory is
            read element by element.

    Raises:
        ValueError: if constexprs or aligned name other arguments than the kernel has.
        EngineError: if the kernel cannot be compiled, or uses scratch memory, which a plugin cannot give it.
    """
    constants = {name for name, kind in signature.items() if kind == "constexpr"}
    if constants != set(constexprs) or not set(aligned) <= set(signature) - constants:
        raise ValueError(
            f"{kernel.__name__} takes the arguments {list(signature)}, of which {sorted(constants)} are constexprs; "
            f"got constexprs {sorted(constexprs)} and aligned {sorted(aligned)}."
        )
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in aligned}
    version = _BLACKWELL_PTX_VERSION if capability >= _BLACKWELL else _PTX_VERSION
    options = {**compiler_options(num_warps, num_stages), "ptx_version": version}
    try:
        compiled = triton.compile(
            ASTSource(kernel, dict(signature), dict(constexprs), attributes),
            target=GPUTarget("cuda", capability, _WARP),
            options=options,
        )
    except Exception as error:  # the exceptions of Triton's compiler have no base class of their own
        what = f"{kernel.__name__} does not compile for compute capability {capability}"
        raise EngineError(f"{what}: {error}") from error
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise EngineError(
            f"{metadata.name} needs {metadata.global_scratch_size} + {metadata.profile_scratch_size} bytes of scratch "
            "memory, which an ahead-of-time plugin cannot provide. Use smaller blocks."
        )
    text = strip_parameters(compiled.asm["ptx"], len(signature) - len(constants))
    return Ptx(metadata.name, text, metadata.shared, num_warps)


def strip_parameters(text: str, count: int) -> str:
    """Return PTX whose entry has only its first ``count`` parameters.

    Raises:
        EngineError: if the entry has fewer, or a later one is used.
    """
    start, end, declared = _entry(text)
    declarations = declared.split(",")
    names = [declaration.split()[-1] for declaration in declarations]
    body = text[end:]
    used = [name for name in names[count:] if re.search(rf"\b{re.escape(name)}\b", body)]
    if used or len(names) < count:
        raise EngineError(
            f"the kernel's PTX has {len(names)} parameters, of which {count} are its arguments"
            f"{', and uses ' + ', '.join(used) if used else ''}: this version of Triton is not supported. "
            "Use one from 3.6 to 3.9."
        )
    return text[:start] + ",".join(declarations[:count]).rstrip() + "\n" + body


def _entry(text: str) -> tuple[int, int, str]:
    """Return the start, end and text of the parameter list of the only entry."""
    entries = list(re.finditer(r"\.entry\s+\w+\s*\(([^)]*)\)", text))
    if len(entries) != 1:
        raise EngineError(f"the PTX has {len(entries)} entries, expected 1.")
    return entries[0].start(1), entries[0].end(1), entries[0][1]
