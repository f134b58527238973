from __future__ import annotations

import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from icexport.parity.half import WideProducts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_are_those_of_float32_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 6, 8, 8).to(dtype), torch.randn(4, 6, 3, 3).to(dtype), torch.randn(4).to(dtype)
    left, right = torch.randn(3, 5, 7).to(dtype), torch.randn(3, 7, 2).to(dtype)
    layer = nn.Linear(7, 3).to(dtype)

    with torch.inference_mode(), WideProducts():
        found = [F.conv2d(x, weight, bias, padding=1), left @ right, layer(left)]

    wide = [
        F.conv2d(x.float(), weight.float(), bias.float(), padding=1),
        left.float() @ right.float(),
        F.linear(left.float(), layer.weight.float(), layer.bias.float()),
    ]
    for value, expected in zip(found, wide, strict=True):
        assert value.dtype == dtype
        assert torch.equal(value, expected.to(dtype))


def test_values_that_are_too_large_are_still_infinite() -> None:
    with torch.inference_mode(), WideProducts():
        assert torch.isinf(torch.full((1, 4), 300.0).half() @ torch.full((4, 1), 300.0).half())


def test_everything_else_is_as_it_was() -> None:
    x = torch.randn(4, 4)
    with torch.inference_mode(), WideProducts():
        assert torch.equal(x @ x, torch.mm(x, x))
        assert torch.equal((x.half() + 1).softmax(-1), torch.softmax(x.half() + 1, -1))
        assert (x.half().relu_()).dtype == torch.float16
    assert (x.half() @ x.half()).dtype == torch.float16


def test_a_convolution_of_float16_takes_no_more_than_a_few_times_that_of_float32() -> None:
    """On a processor without float16 arithmetic it takes hundreds of times as long otherwise."""
    x, weight = torch.randn(1, 64, 64, 64), torch.randn(64, 64, 3, 3)

    def seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
        best = 1e9
        for _ in range(5):
            started = time.perf_counter()
            F.conv2d(x, weight, padding=1)
            best = min(best, time.perf_counter() - started)
        return best

    with torch.inference_mode():
        plain = seconds(x, weight)
        with WideProducts():
            assert seconds(x.half(), weight.half()) < 10 * plain
