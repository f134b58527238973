from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from icexport import conditions
from icexport.conditions import depth, hed
from icexport.errors import UnsupportedOptionError, UsageError
from tests.tiny_models import save_tiny_depth
from training.tasks import extractors
from training.tasks.extractors import reward_extractor
from training.tasks.losses import reward_loss


def pictures(batch: int = 2, side: int = 24) -> Tensor:
    coarse = torch.rand(batch, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)


@pytest.fixture(scope="module")
def hed_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Random weights of a HED with few channels, saved as safetensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hed, "BLOCKS", ((2, 4), (2, 6), (3, 8), (3, 8), (3, 8)))
        torch.manual_seed(5)
        path = tmp_path_factory.mktemp("hed") / "hed.safetensors"
        save_file(hed.HedNetwork().state_dict(), path)
        yield path


@pytest.fixture(scope="module")
def depth_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dpt")
    save_tiny_depth(path, patch=16, std=0.2, bias=10.0)
    return path


def test_canny_target_comes_from_the_real_picture() -> None:
    extractor, pixels = reward_extractor(conditions.get("canny")), pictures()
    target = extractor.target(torch.zeros_like(pixels), pixels)
    torch.testing.assert_close(target, extractor(pixels), rtol=0, atol=0)
    assert target.max() > 0.1
    assert not extractor.blank(target).any()
    with pytest.raises(UsageError, match="the batch needs the pictures"):
        extractor.target(torch.zeros_like(pixels), None)


def test_canny_is_in_units_of_the_sobel_gradient() -> None:
    """A vertical step of height 1 after the 5 x 5 blur: 4 times the kernel's three middle weights' share."""
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[..., 8:] = 1
    weights = np.exp(-(np.arange(-2, 3) ** 2) / 2)
    expected = 4 * (weights / weights.sum())[2:4].sum()
    found = reward_extractor(conditions.get("canny"))(pixels)
    columns = found[0, 0].nonzero()[:, 1].unique().tolist()
    assert columns == [7]
    torch.testing.assert_close(found[0, 0, :, 7], torch.full((16,), float(expected)))


def test_canny_follows_thin_lines_under_autocast() -> None:
    pixels, extractor = pictures(), reward_extractor(conditions.get("canny"))
    with torch.autocast("cpu", torch.bfloat16):
        found = extractor(pixels)
    torch.testing.assert_close(found, extractor(pixels), rtol=0, atol=0)


def test_hed_and_lineart_targets_are_the_control_maps(hed_file: Path) -> None:
    control = pictures()
    for condition in (conditions.get("hed", weights=hed_file), conditions.get("lineart")):
        extractor = reward_extractor(condition)
        target = extractor.target(control, None)
        torch.testing.assert_close(target, control.mean(1, keepdim=True))
        assert not extractor.blank(torch.zeros(2, 1, 8, 8)).any()
        torch.testing.assert_close(extractor(pictures()), condition.extract_batch(pictures())[:, :1])


def reward(extractor: extractors.RewardExtractor, z0: Tensor) -> Tensor:
    target = extractor.target(torch.zeros(2, 3, 24, 24), pictures())
    return reward_loss(z0, target, torch.zeros(2, dtype=torch.long), (0, 0), lambda z: z, extractor)


@pytest.mark.parametrize("name", ["canny", "hed", "lineart", "depth"])
def test_gradient_reaches_what_is_decoded(name: str, hed_file: Path, depth_folder: Path) -> None:
    options = {"hed": {"weights": hed_file}, "depth": {"model": depth_folder}}
    z0 = pictures().flip(0).requires_grad_()
    reward(reward_extractor(conditions.get(name, **options.get(name, {}))), z0).backward()
    assert z0.grad is not None
    assert z0.grad.isfinite().all()
    assert (z0.grad.abs().amax((1, 2, 3)) > 0).all()


def test_legacy_hed_has_no_gradient(hed_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    condition = conditions.get("hed", weights=hed_file)
    with caplog.at_level(logging.WARNING):
        legacy = reward_extractor(condition, legacy=True)
    assert "has no gradient" in caplog.text
    z0 = pictures().requires_grad_()
    loss = reward(legacy, z0)
    assert loss > 0
    (loss + 0 * z0.sum()).backward()  # alone it could not even be differentiated
    assert not loss.requires_grad
    assert z0.grad is not None
    assert not z0.grad.any()
    levels = 255 * legacy(pictures())
    torch.testing.assert_close(levels, levels.round())
    exact = 255 * reward_extractor(condition)(pictures())
    assert ((exact - levels) >= -1e-4).all()  # a cast cuts off, it does not round
    assert (exact - levels).max() > 0.5


def test_legacy_is_for_hed_only() -> None:
    with pytest.raises(UsageError, match="exists for hed only, not for canny"):
        reward_extractor(conditions.get("canny"), legacy=True)


def test_depth_is_divided_by_its_maximum_only(depth_folder: Path) -> None:
    extractor = reward_extractor(conditions.get("depth", model=depth_folder))
    found = extractor(pictures(side=32))
    torch.testing.assert_close(found.amax((1, 2, 3)), torch.ones(2))
    assert found.amin() > 0.01
    control = torch.stack((torch.full((3, 8, 8), 0.4), torch.zeros(3, 8, 8)))
    control[0, :, 0] = 0.1
    target = extractor.target(control, None)
    assert target.shape == (2, 1, 8, 8)
    assert target[0, 0, :, 0].tolist() == [0.25] + [1.0] * 7
    assert extractor.blank(target).tolist() == [False, True]


def test_blank_depth_is_finite(depth_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = depth._load(str(depth_folder), torch.device("cpu"))
    monkeypatch.setattr(model.head, "forward", lambda states: torch.zeros_like(states[-1][:, 0]))
    extractor = reward_extractor(conditions.get("depth", model=depth_folder))
    assert extractor(pictures()).abs().max() == 0


def test_metric_depth_is_refused(depth_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = depth._load(str(depth_folder), torch.device("cpu"))
    monkeypatch.setattr(model.config, "depth_estimation_type", "metric", raising=False)
    with pytest.raises(UnsupportedOptionError, match="gives distances"):
        reward_extractor(conditions.get("depth", model=depth_folder))(pictures())
