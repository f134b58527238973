"""Kernels compiled without a GPU: for every architecture, within its limits, with the parameters of a plugin."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from engines.errors import EngineError
from engines.kernels import SPECS, aot, tuning
from engines.kernels.aot import Ptx, compile_ptx, signature, strip_parameters
from tests.engines.kernels.ptx import parameters, resources, target

ARCHITECTURES = (80, 89, 90, 120)
TARGETS = {80: "sm_80", 89: "sm_89", 90: "sm_90a", 120: "sm_120a"}
# Arguments in the order of the ahead-of-time plugins: inputs, int32 scalars, outputs.
COUNTS = {
    "dual_projection": (2, 3, 1),
    "resize_group_norm_relu": (4, 7, 1),
    "residual_mix": (8, 8, 1),
    "fidelity_reduce": (2, 5, 1),
}
GROUPS = {"GROUPS": 32, "EPS": 1e-5}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "dual_projection": [{}],
    "resize_group_norm_relu": [
        {**GROUPS, "CHANNELS": 3, "RESIZE": True, "SHIFT_PER_SAMPLE": True},
        {**GROUPS, "CHANNELS": 3, "RESIZE": False, "SHIFT_PER_SAMPLE": False},
    ],
    "residual_mix": [
        {**GROUPS, "CHANNELS": 12, "RESIZE": True, "NORMALISE": True},
        {**GROUPS, "CHANNELS": 12, "RESIZE": True, "NORMALISE": False},
        {**GROUPS, "CHANNELS": 12, "RESIZE": False, "NORMALISE": True},
        {**GROUPS, "CHANNELS": 12, "RESIZE": False, "NORMALISE": False},
    ],
    "fidelity_reduce": [{"CHANNELS": 3}, {"CHANNELS": 1}],
}
SIZES = {"dual_projection": 4096, "fidelity_reduce": 512 * 512}  # else samples * groups: 32


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def build(name: str, dtype: torch.dtype, capability: int, variant: int = 0, size: int | None = None) -> Ptx:
    kernel = importlib.import_module(f"engines.kernels.{name}.kernel").KERNEL
    types = signature(kernel, dtype)
    config = tuning.choose(name, capability, size or SIZES.get(name, 32), dtype.itemsize)
    constexprs = {**VARIANTS[name][variant], **config.constants}
    aligned = [argument for argument, kind in types.items() if kind.startswith("*") or argument == "pixels"]
    return compile_ptx(kernel, types, constexprs, capability, config.num_warps, config.num_stages, aligned)


def main_dtype(name: str) -> torch.dtype:
    return torch.float16 if torch.float16 in SPECS[name].dtypes else torch.float32


def assert_sound(name: str, ptx: Ptx, capability: int) -> None:
    inputs, scalars, outputs = COUNTS[name]
    kinds = [declaration.split()[1] for declaration in parameters(ptx.text)]
    assert kinds == [".u64"] * inputs + [".u32"] * scalars + [".u64"] * outputs
    assert target(ptx.text) == TARGETS[capability]
    assert re.search(rf"\.reqntid {32 * ptx.num_warps}\b", ptx.text)
    assert ptx.shared_memory <= 99 * 1024  # what the GPUs of 86, 89 and 120 can give one program
    needed = resources(ptx, capability)
    assert needed.spill_bytes == 0
    assert needed.registers * 32 * ptx.num_warps <= 65536


@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("name", SPECS)
def test_every_kernel_is_compiled_and_assembled(name: str, capability: int) -> None:
    assert_sound(name, build(name, main_dtype(name), capability), capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize(
    ("name", "dtype", "variant"),
    [
        (name, dtype, variant)
        for name, spec in SPECS.items()
        for dtype in spec.dtypes
        for variant in range(len(VARIANTS[name]))
    ],
)
def test_every_variant_is_compiled_and_assembled(name: str, dtype: torch.dtype, variant: int, capability: int) -> None:
    assert_sound(name, build(name, dtype, capability, variant), capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("size", [256, 1024])
def test_every_tile_of_the_projection_is_assembled(size: int, dtype: torch.dtype, capability: int) -> None:
    assert_sound("dual_projection", build("dual_projection", dtype, capability, size=size), capability)


@pytest.mark.parametrize("name", SPECS)
def test_the_portable_ptx_is_taken_by_every_later_architecture(name: str) -> None:
    portable = build(name, main_dtype(name), aot.PORTABLE)
    assert [resources(portable, capability).spill_bytes for capability in (86, 89, 90, 120)] == [0, 0, 0, 0]


def test_ptx_of_one_architecture_is_refused_by_another() -> None:
    with pytest.raises(AssertionError, match=r"ptxas refuses .* \(sm_90a\) for sm_120"):
        resources(build("fidelity_reduce", torch.float32, 90), 120)


def test_memory_is_read_in_large_pieces_where_arguments_are_aligned() -> None:
    """16 bytes at once, else a kernel that only moves data is several times slower."""
    direct = build("resize_group_norm_relu", torch.float16, 90, variant=1)
    assert "ld.global.v4.b32" in direct.text
    assert "st.global.v4.b32" in direct.text
    assert "cp.async" in build("dual_projection", torch.float16, 90).text


PTX = """.version 8.0
.target sm_80
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1,
	.param .u64 .ptr .global .align 1 kernel_param_10
)
{
	ld.param.b32 	%r1, [kernel_param_1];
	ret;
}
"""


def test_parameters_after_the_arguments_are_taken_out() -> None:
    assert parameters(strip_parameters(PTX, 2)) == [
        ".param .u64 .ptr .global .align 1 kernel_param_0",
        ".param .u32 kernel_param_1",
    ]
    assert strip_parameters(PTX, 2).partition(")")[2] == PTX.partition(")")[2]


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        (PTX.replace("ret;", "ld.param.b64 %rd1, [kernel_param_10];"), 2, "uses kernel_param_10"),
        (PTX, 1, "uses kernel_param_1"),
        (PTX, 4, "has 3 parameters, of which 4 are its arguments"),
        ("", 1, "0 entries"),
    ],
)
def test_ptx_that_a_plugin_could_not_launch_is_refused(text: str, count: int, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        strip_parameters(text, count)


def test_wrong_arguments_are_refused() -> None:
    kernel = importlib.import_module("engines.kernels.fidelity_reduce.kernel").KERNEL
    types = signature(kernel, torch.float32)
    with pytest.raises(ValueError, match="got constexprs \\['BLOCK'\\]"):
        compile_ptx(kernel, types, {"BLOCK": 128}, 80, 4, 1)
    with pytest.raises(ValueError, match="aligned \\['nothing'\\]"):
        compile_ptx(kernel, types, {"BLOCK": 128, "CHANNELS": 3}, 80, 4, 1, ["nothing"])
    with pytest.raises(EngineError, match="does not compile for compute capability 80"):
        compile_ptx(kernel, types, {"BLOCK": 100, "CHANNELS": 3}, 80, 4, 1)
    with pytest.raises(ValueError, match=r"torch\.int32, expected one of torch\.float32"):
        signature(kernel, torch.int32)
