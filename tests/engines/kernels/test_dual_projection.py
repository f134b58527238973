"""The operator: what it computes, and the arguments that it refuses."""

from __future__ import annotations

import re

import pytest
import torch

from engines.kernels import SPECS

SPEC = SPECS["dual_projection"]


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
