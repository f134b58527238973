"""Control scores against hand-made maps and plain formulas."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch

from icexport.errors import UsageError
from icexport.fidelity.metrics import default_tolerance_px, depth_rmse, edge_f1, min_max, psnr, ssim


def line(column: int, channels: int = 1, width: int = 20) -> torch.Tensor:
    """A white vertical line on black, ``[1,C,12,W]``."""
    edges = torch.zeros(1, channels, 12, width)
    edges[..., column] = 1
    return edges


@pytest.mark.parametrize(("shift", "tolerance", "expected"), [(0, 0, 1), (1, 0, 0), (1, 1, 1), (2, 1, 0), (2, 2, 1)])
def test_edge_f1_tolerance_is_in_pixels(shift: int, tolerance: int, expected: float) -> None:
    assert edge_f1(line(5 + shift), line(5), tolerance).tolist() == [expected]


def test_edge_f1_tolerance_is_a_square() -> None:
    one, other = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    one[..., 2, 2] = other[..., 4, 4] = 1
    assert edge_f1(one, other, 1).item() == 0
    assert edge_f1(one, other, 2).item() == 1


def test_edge_f1_combines_precision_and_recall() -> None:
    both = line(3).maximum(line(15))
    assert edge_f1(both, line(3), 1).item() == pytest.approx(2 / 3)  # precision 1/2, recall 1
    assert edge_f1(line(3), both, 1).item() == pytest.approx(2 / 3)


def test_edge_f1_of_blank_maps() -> None:
    blank, some = torch.zeros(1, 1, 12, 20), line(4)
    predicted, target = torch.cat([blank, blank, some, some]), torch.cat([blank, some, blank, some])
    assert edge_f1(predicted, target, 1).tolist() == [1, 0, 0, 1]


def test_edge_f1_takes_bool_and_three_channels() -> None:
    assert edge_f1(line(4, channels=3), line(4) > 0, 0).tolist() == [1]
    assert edge_f1(0.4 * line(4), line(4), 0).tolist() == [0]


def test_default_tolerance() -> None:
    assert [default_tolerance_px(*size) for size in ((32, 32), (64, 64), (128, 256), (512, 512))] == [1, 1, 2, 8]


def reference_ssim(x: np.ndarray, y: np.ndarray) -> float:
    def mean(values: np.ndarray) -> np.ndarray:
        return np.asarray(cv2.GaussianBlur(values, (11, 11), 1.5))[5:-5, 5:-5]

    variance_x, variance_y = mean(x * x) - mean(x) ** 2, mean(y * y) - mean(y) ** 2
    covariance = mean(x * y) - mean(x) * mean(y)
    numerator = (2 * mean(x) * mean(y) + 1e-4) * (2 * covariance + 9e-4)
    return float((numerator / ((mean(x) ** 2 + mean(y) ** 2 + 1e-4) * (variance_x + variance_y + 9e-4))).mean())


def test_ssim_matches_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 2, 1, 24, 37, generator=generator)
    y = 0.7 * x + 0.3 * y
    expected = [reference_ssim(*(maps[i, 0].double().numpy() for maps in (x, y))) for i in range(2)]
    torch.testing.assert_close(ssim(x, y), torch.tensor(expected), atol=1e-6, rtol=0)
    torch.testing.assert_close(ssim(x, x), torch.ones(2))


def test_depth_rmse_ignores_scale_and_offset() -> None:
    ramp = torch.linspace(0, 1, 64).view(1, 1, 8, 8)
    assert depth_rmse(3 * ramp + 7, ramp).item() == pytest.approx(0, abs=1e-4)
    opposite = 255 * (2 * ramp - 1).square().mean().sqrt().item()
    assert depth_rmse(-ramp, ramp).item() == pytest.approx(opposite, rel=1e-5)


def test_flat_depth_is_finite() -> None:
    flat = torch.full((1, 1, 8, 8), 0.3, requires_grad=True)
    stretched = min_max(flat)
    stretched.sum().backward()
    assert stretched.abs().max() == 0
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


def test_psnr() -> None:
    black = torch.zeros(2, 3, 4, 4)
    other = black.clone()
    other[1] = 0.1
    scores = psnr(black, other)
    assert scores[0] == math.inf
    assert scores[1].item() == pytest.approx(20, abs=1e-4)


@pytest.mark.parametrize("function", [ssim, depth_rmse, psnr, lambda x, y: edge_f1(x, y, 1)])
def test_shape_mismatch_is_named(function) -> None:
    with pytest.raises(UsageError, match=r"\(1, 1, 16, 16\).*\(1, 1, 16, 8\)"):
        function(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 8))


def test_bad_arguments() -> None:
    with pytest.raises(UsageError, match="11 x 11"):
        ssim(torch.zeros(1, 1, 10, 20), torch.zeros(1, 1, 10, 20))
    with pytest.raises(UsageError, match="tolerance_px is -1"):
        edge_f1(line(1), line(1), -1)
    with pytest.raises(UsageError, match="Edge maps have shape"):
        edge_f1(torch.zeros(8, 8), torch.zeros(8, 8), 1)
