"""The torch Canny against OpenCV's, and its soft form."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from icexport.conditions import get
from icexport.conditions.canny import canny_edges
from icexport.errors import ConditionError
from icexport.host.pictures import round_to_8bit


def opencv_edges(pixels: Tensor, low: float, high: float) -> Tensor:
    levels = (255 * pixels).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    return torch.from_numpy(np.stack([cv2.Canny(picture, low, high) for picture in levels]) > 0)


def smooth_pictures() -> Tensor:
    coarse = torch.rand(12, 3, 9, 11, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (72, 101), mode="bicubic").clamp(0, 1)


def noisy_pictures() -> Tensor:
    return torch.rand(12, 3, 40, 33, generator=torch.Generator().manual_seed(1))


def flat_shapes() -> Tensor:
    """Few grey levels: many equal gradients, where the rules for ties decide."""
    return (3 * F.interpolate(noisy_pictures()[..., :10, :10], (60, 50))).round() / 3


@pytest.mark.parametrize("thresholds", [(60, 140), (0, 0), (30.5, 400), (200, 200)])
@pytest.mark.parametrize("pictures", [smooth_pictures, noisy_pictures, flat_shapes])
def test_torch_edges_equal_opencv(pictures, thresholds: tuple[float, float]) -> None:
    pixels = pictures()
    expected = opencv_edges(pixels, *thresholds)
    assert 0.005 < expected.float().mean() < 0.6
    assert torch.equal(canny_edges(round_to_8bit(pixels), *thresholds)[:, 0] > 0, expected)
    edges = get("canny", low_threshold=thresholds[0], high_threshold=thresholds[1]).extract_batch(pixels)
    assert torch.equal(edges[:, 0] > 0, expected)
    assert edges.unique().tolist() == [0, 1]


@pytest.mark.gpu
def test_edges_on_a_gpu_equal_opencv() -> None:
    pixels = torch.cat([smooth_pictures(), 1 - smooth_pictures()])
    edges = get("canny").extract_batch(pixels.cuda())
    assert edges.is_cuda
    assert torch.equal(edges[:, 0].cpu() > 0, opencv_edges(pixels, 60, 140))


def test_hysteresis_follows_weak_edges_to_the_end() -> None:
    contrast = torch.linspace(0.2, 0.03, 60).view(1, 1, 60, 1)  # an edge that starts strong and fades
    pixels = torch.zeros(1, 3, 60, 20)
    pixels[..., 10:] = contrast
    with_hysteresis, without = (canny_edges(round_to_8bit(pixels), low, 140)[0, 0].any(1) for low in (35, 140))
    assert with_hysteresis.sum() > 2 * without.sum() > 0


def test_soft_map_is_the_thinned_gradient() -> None:
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[..., 8:] = 0.6
    soft = get("canny", soft=True).extract_batch(pixels)[0, 0]
    columns = soft.amax(0)
    assert columns.nonzero().numel() == 1
    assert columns.max().item() == pytest.approx(4 * 0.6 / 6)


@pytest.mark.parametrize("blur_sigma", [0, 1])
def test_soft_map_is_differentiable(blur_sigma: float) -> None:
    canny = get("canny", soft=True, blur_sigma=blur_sigma)
    source, other = smooth_pictures()[:1], smooth_pictures()[1:2].requires_grad_()
    loss = F.mse_loss(canny.extract_batch(other), canny.extract_batch(source))
    loss.backward()
    assert other.grad is not None
    assert other.grad.isfinite().all()
    step = other.detach() - 0.5 * other.grad / other.grad.abs().max() * 0.01
    assert F.mse_loss(canny.extract_batch(step), canny.extract_batch(source)) < loss


def test_flat_picture_has_no_edges_and_finite_gradients() -> None:
    pixels = torch.full((1, 3, 16, 16), 0.5, requires_grad=True)
    assert get("canny").extract_batch(pixels).max() == 0
    soft = get("canny", soft=True).extract_batch(pixels)
    soft.sum().backward()
    assert soft.max() == 0
    assert pixels.grad is not None
    assert pixels.grad.isfinite().all()


def test_score_tolerance_grows_with_the_picture() -> None:
    pixels = torch.zeros(1, 3, 128, 128)
    pixels[..., 64:] = 1
    edges = get("canny").extract_batch(pixels)
    assert get("canny").score(pixels, edges.roll(2, -1)).item() == 1
    assert get("canny").score(pixels, edges.roll(3, -1)).item() == 0
    assert get("canny").score(pixels, edges.roll(2, -1), tolerance_px=1).item() == 0


@pytest.mark.parametrize(("low", "high"), [(-1, 10), (20, 10), (10, 1531)])
def test_thresholds_are_checked(low: float, high: float) -> None:
    with pytest.raises(ConditionError, match="1530"):
        get("canny", low_threshold=low, high_threshold=high)


def test_blur_is_checked() -> None:
    with pytest.raises(ConditionError, match="blur_sigma is -1"):
        get("canny", blur_sigma=-1)
