"""The operator fidelity_reduce: checks of arguments, and its kernel against the reference."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.library import opcheck

from engines.kernels import SPECS
from engines.kernels.check import check
from engines.kernels.spec import Case

SPEC = SPECS["fidelity_reduce"]
SMALL = [case for case in SPEC.cases if not case.large]
CPU = torch.device("cpu")


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_kernel_is_as_exact_as_torch_in_the_interpreter(
    case: Case, interpreted: Callable[[str], dict[str, list[dict[str, Any]]]]
) -> None:
    results = interpreted(SPEC.name)[str(case)]
    assert results
    assert not [(result["dtype"], result["problems"]) for result in results if result["problems"]]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", SPEC.dtypes, ids=str)
@pytest.mark.parametrize("case", SPEC.cases, ids=str)
def test_the_kernel_is_as_exact_as_torch_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    assert check(SPEC, case, "cuda", dtype).problems == ()


@pytest.mark.parametrize("dtype", SPEC.dtypes, ids=str)
def test_the_operator_meets_the_rules_of_torch(dtype: torch.dtype) -> None:
    channels_last = next(case for case in SMALL if case.layout == "channels_last")
    opcheck(getattr(torch.ops.icexport, SPEC.name).default, SPEC.arguments(channels_last, dtype, CPU))


def test_the_operator_sums_errors_over_three_channels() -> None:
    reading = torch.tensor([[[[0.0, 1.0]]]])  # resized: 0, 0.25, 0.75, 1
    assert SPEC.op(reading, torch.zeros(1, 3, 1, 4)).tolist() == [[3 * 2.0, 3 * 1.625]]


@pytest.mark.parametrize(
    ("reading", "target", "message"),
    [
        (torch.ones(1, 2, 4, 4), torch.ones(1, 3, 8, 8), "reading has 2 channels, expected 1 or 3"),
        (torch.ones(2, 1, 4, 4), torch.ones(1, 3, 8, 8), "reading is [2, 1, 4, 4], expected [1, 1 or 3, h, w]"),
        (torch.ones(1, 1, 4, 4), torch.ones(1, 1, 8, 8), "target is [1, 1, 8, 8], expected [b, 3, H, W]"),
        (
            torch.ones(1, 1, 4, 4).half(),
            torch.ones(1, 3, 8, 8).half(),
            "reading is torch.float16, expected torch.float32",
        ),
    ],
)
def test_the_operator_refuses_what_does_not_fit(reading: torch.Tensor, target: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SPEC.op(reading, target)
