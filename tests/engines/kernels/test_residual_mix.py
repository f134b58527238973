"""The operator: what it computes, and the arguments that it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from engines.kernels import SPECS

SPEC = SPECS["residual_mix"]


def test_the_operator_adds_the_weighted_sum_of_both_branches() -> None:
    main = torch.tensor([[[[-1.0, 1.0]]]])
    skip = torch.tensor([[[[7.0]], [[0.5]]]])  # the shortcut is channel 1, resized
    one, zero = torch.ones(1), torch.zeros(1)
    mix = torch.tensor([9.0, 2.0])
    result = SPEC.op(torch.full_like(main, 10), main, skip, one, zero, one, zero, mix, 1, 1, 1, 1e-12, False)
    torch.testing.assert_close(result, torch.tensor([[[[10.0, 13.0]]]]))


def _arguments(**changes: Any) -> tuple[Any, ...]:
    vector = torch.ones(4)
    arguments = {
        "accumulated": torch.ones(2, 4, 5, 5),
        "main": torch.ones(2, 4, 5, 5),
        "skip": torch.ones(2, 6, 3, 3),
        "main_gamma": vector,
        "main_beta": vector,
        "skip_gamma": vector,
        "skip_beta": vector,
        "mix": torch.ones(9),
        "index": 8,
        "first_channel": 2,
        "num_groups": 2,
        "eps": 1e-5,
        "normalise_skip": True,
    }
    return tuple((arguments | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulated": torch.ones(2, 4, 5, 4)}, "accumulated is [2, 4, 5, 4], expected [2, 4, 5, 5]"),
        ({"skip": torch.ones(1, 6, 3, 3)}, "skip is [1, 6, 3, 3], expected [2, Cs, h, w]"),
        ({"skip_beta": torch.ones(3)}, "skip_beta is [3], expected [4]"),
        ({"mix": torch.ones(1, 9)}, "mix is [1, 9], expected [L]"),
        ({"index": 9}, "index is 9, but the weights in mix are numbered 0 to 8"),
        ({"first_channel": 3}, "channels 3 to 7 of skip are wanted, but it has 6"),
        ({"num_groups": 3}, "3 groups cannot share 4 channels"),
    ],
)
def test_the_operator_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    SPEC.op(*_arguments())
    with pytest.raises(ValueError, match=re.escape(message)):
        SPEC.op(*_arguments(**changes))
