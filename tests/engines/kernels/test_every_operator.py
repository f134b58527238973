"""What holds for every operator: as exact as torch in the interpreter and on a GPU, and within the rules of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.library import opcheck

from engines.kernels import SPECS
from engines.kernels.check import check
from engines.kernels.spec import Case

CASES = [(name, case) for name, spec in SPECS.items() for case in spec.cases]
SMALL = [(name, case) for name, case in CASES if not case.large]
CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "case"), SMALL, ids=str)
def test_the_kernel_is_as_exact_as_torch_in_the_interpreter(
    name: str, case: Case, interpreted: Callable[[str], dict[str, list[dict[str, Any]]]]
) -> None:
    results = interpreted(name)[str(case)]
    assert results
    assert not [(result["dtype"], result["problems"]) for result in results if result["problems"]]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "case"), CASES, ids=str)
def test_the_kernel_is_as_exact_as_torch_on_a_gpu(name: str, case: Case) -> None:
    for dtype in SPECS[name].dtypes:
        assert check(SPECS[name], case, "cuda", dtype).problems == ()


@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name, spec in SPECS.items() for dtype in spec.dtypes])
def test_the_operator_meets_the_rules_of_torch(name: str, dtype: torch.dtype) -> None:
    spec = SPECS[name]
    channels_last = next(case for case in spec.cases if not case.large and case.layout == "channels_last")
    opcheck(getattr(torch.ops.icexport, name).default, spec.arguments(channels_last, dtype, CPU))
