"""The operator: what it computes, and the arguments that it refuses."""

from __future__ import annotations

import re

import pytest
import torch

from engines.kernels import SPECS

SPEC = SPECS["fidelity_reduce"]


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
