"""The operator dual_projection: checks of arguments, and its kernel against the reference."""

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

SPEC = SPECS["dual_projection"]
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


def test_the_operator_multiplies_each_pixel_by_the_weight() -> None:
    x = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    weight = torch.tensor([[1.0, 10.0], [0.0, -1.0], [2.0, 0.0]])
    assert SPEC.op(x, weight).tolist() == [[[[31.0, 42.0]], [[-3.0, -4.0]], [[2.0, 4.0]]]]


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(1, 3, 2), torch.ones(4, 3), "x is [1, 3, 2], expected [B, C, h, w]"),
        (torch.ones(1, 3, 2, 2), torch.ones(4, 2), "weight is [4, 2], expected [O, 3]"),
        (torch.ones(1, 3, 2, 2), torch.ones(4, 3).half(), "weight is torch.float16 on cpu, but x is torch.float32"),
        (torch.ones(1, 3, 2, 2).double(), torch.ones(4, 3).double(), "x is torch.float64, expected torch.float32 or"),
        (torch.ones(1, 3, 0, 2), torch.ones(4, 3), "x is [1, 3, 0, 2], expected at least one element"),
    ],
)
def test_the_operator_refuses_what_does_not_fit(x: torch.Tensor, weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SPEC.op(x, weight)
