"""The operator: what it computes, and the arguments that it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from engines.kernels import SPECS

SPEC = SPECS["resize_group_norm_relu"]


def test_the_operator_resizes_normalises_rectifies_and_shifts() -> None:
    x = torch.tensor([[[[9.0, 9.0]], [[1.0, 3.0]]]])  # channel 0 is not read
    one = torch.ones(1)
    result = SPEC.op(x, 2 * one, one, torch.tensor([[10.0]]), 1, 1, 4, 1, 1e-5)
    resized = torch.tensor([1.0, 1.5, 2.5, 3.0])
    normal = (resized - 2.0) / (0.625 + 1e-5) ** 0.5
    torch.testing.assert_close(result.flatten(), (2 * normal + 1).clamp(min=0) + 10)


def _arguments(**changes: Any) -> tuple[Any, ...]:
    vector = torch.ones(4)
    arguments = {
        "x": torch.ones(2, 6, 3, 3),
        "gamma": vector,
        "beta": vector,
        "shift": torch.ones(1, 4),
        "first_channel": 2,
        "height": 3,
        "width": 3,
        "num_groups": 2,
        "eps": 1e-5,
    }
    return tuple((arguments | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": torch.ones(3)}, "beta is [3], expected [4]"),
        ({"shift": torch.ones(3, 4)}, "shift is [3, 4], expected [2, 4]"),
        ({"first_channel": 3}, "channels 3 to 7 of x are wanted, but it has 6"),
        ({"first_channel": -1}, "channels -1 to 3 of x are wanted"),
        ({"height": 0}, "the result would be 0 x 3 px"),
        ({"num_groups": 3}, "3 groups cannot share 4 channels"),
        ({"eps": 0.0}, "eps is 0.0, expected a positive number"),
    ],
)
def test_the_operator_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    SPEC.op(*_arguments())
    with pytest.raises(ValueError, match=re.escape(message)):
        SPEC.op(*_arguments(**changes))
