"""The criterion sees what it is made for; the table of cases is whole; the package works without Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engines.kernels import SPECS, KernelSpec
from engines.kernels.check import check

ROOT = Path(__file__).parents[3]
SPEC = SPECS["resize_group_norm_relu"]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_operator_itself_passes(spec: KernelSpec) -> None:
    assert check(spec, spec.cases[0], "cpu", spec.dtypes[0]).ok


def _hole(result: Tensor) -> Tensor:
    whole = torch.empty_like(result)
    whole[..., 1:] = result[..., 1:]
    return whole


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_hole, "largest error is inf"),
        (lambda result: result.double(), "returns torch.float64"),
        (lambda result: result[:, :1], "returns torch.float32 [1, 1,"),
        (lambda result: result + 1e-5, "rms error"),
        (lambda result: result.index_fill(3, torch.tensor([0]), 1e30), "largest error"),
    ],
)
def test_a_faulty_kernel_fails(fault: Callable[[Tensor], Tensor], message: str) -> None:
    result = check(SPEC, SPEC.cases[0], "cpu", torch.float32, lambda *arguments: fault(SPEC.reference(*arguments)))
    assert not result.ok
    assert any(message in problem for problem in result.problems)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_cases_have_names_of_their_own_and_kinds_of_every_sort(spec: KernelSpec) -> None:
    assert len({str(case) for case in spec.cases}) == len(spec.cases)
    assert {case.batch for case in spec.cases} >= {1, 2, 3}
    assert {case.values for case in spec.cases} == {"randn", "zeros", "constant", "huge", "outlier"}
    assert {case.layout for case in spec.cases} == {"contiguous", "channels_last", "strided"}
    assert {case.large for case in spec.cases} == {True, False}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_traffic_is_at_least_that_of_the_maps(spec: KernelSpec) -> None:
    """Counted from the tensors themselves; channels of x or skip that the operator does not need do not count."""
    for case in spec.cases:
        if case.large or case.source[0] > case.target[0]:
            continue
        arguments = spec.arguments(case, torch.float32, torch.device("cpu"))
        maps = [value for value in arguments if isinstance(value, Tensor) and value.dim() == 4]
        result = spec.reference(*arguments)
        least = 4 * sum(tensor.numel() for tensor in (*maps, *([result] if result.dim() == 4 else [])))
        assert least <= spec.traffic_bytes(case, 4) <= least + 4 * (64 + case.source[0] * case.target[0])
        assert spec.flops(case) > 0


def test_sizes_of_stable_diffusion_take_the_work_that_was_counted_by_hand() -> None:
    spec = SPECS["dual_projection"]
    case = next(case for case in spec.cases if case.large and case.source == (1280, 16, 16) and case.batch == 1)
    assert spec.flops(case) == 2 * 1280 * 480 * 16 * 16
    assert spec.traffic_bytes(case, 2) == 2 * (1280 * 256 + 480 * 256 + 1280 * 480)


def test_without_triton_a_cpu_runs_the_reference_and_a_gpu_says_what_is_missing() -> None:
    program = """
import sys
sys.modules["triton"] = None  # what an import finds where Triton is not installed
import torch
from engines.errors import BackendUnavailableError
from engines.kernels import SPECS
for spec in SPECS.values():
    arguments = spec.arguments(spec.cases[0], torch.float32, torch.device("cpu"))
    assert spec.op(*arguments).isfinite().all()
    try:
        spec.run_kernel(*arguments)
    except BackendUnavailableError as error:
        assert "pip install triton" in str(error), error
    else:
        raise AssertionError(spec.name)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
