"""Depth with a tiny random DPT saved to disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForDepthEstimation, DPTImageProcessor

from icexport.conditions import depth, get
from icexport.errors import ConditionError
from tests.tiny_models import save_tiny_depth


@pytest.fixture(scope="module")
def processor() -> DPTImageProcessor:
    return DPTImageProcessor(size={"height": 32, "width": 32})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, processor: DPTImageProcessor) -> Path:
    path = tmp_path_factory.mktemp("dpt")
    save_tiny_depth(path)
    return path


def pictures(batch: int = 2) -> torch.Tensor:
    coarse = torch.rand(batch, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (40, 56), mode="bilinear")


def test_maps_span_the_whole_range(folder: Path) -> None:
    maps = get("depth", model=folder).extract_batch(pictures())
    assert maps.shape == (2, 3, 40, 56)
    assert maps.amin((1, 2, 3)).tolist() == [0, 0]
    torch.testing.assert_close(maps.amax((1, 2, 3)), torch.ones(2))


def test_near_is_white(folder: Path) -> None:
    """DPT predicts inverse depth, large where near: the map must rise with it."""
    model = AutoModelForDepthEstimation.from_pretrained(folder).eval()
    pixels = torch.nn.functional.interpolate(pictures(1), (32, 32))
    with torch.no_grad():
        prediction = model((pixels - 0.5) / 0.5).predicted_depth
    maps = get("depth", model=folder).extract_batch(pixels)[:, 0]
    prediction = torch.nn.functional.interpolate(prediction[None], (32, 32), mode="bicubic")[0]
    assert np.corrcoef(prediction.flatten(), maps.flatten())[0, 1] > 0.999


@pytest.mark.parametrize("keep_aspect_ratio", [False, True])
@pytest.mark.parametrize(("width", "height"), [(56, 40), (30, 90)])
def test_input_is_that_of_the_image_processor(
    processor: DPTImageProcessor, keep_aspect_ratio: bool, width: int, height: int
) -> None:
    processor = DPTImageProcessor(
        size={"height": 70, "width": 70}, keep_aspect_ratio=keep_aspect_ratio, ensure_multiple_of=14
    )
    levels = (255 * torch.nn.functional.interpolate(pictures(1), (height, width), mode="bilinear")).round().byte()
    image = Image.fromarray(levels[0].permute(1, 2, 0).numpy())
    expected = processor(images=image, return_tensors="pt")["pixel_values"]
    got = depth._model_input(levels / 255, processor)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < 0.03  # the processor rounds the resized picture to 8 bits


def test_gradient_reaches_the_pixels(folder: Path) -> None:
    pixels = pictures(1).requires_grad_()
    get("depth", model=folder).extract_batch(pixels).square().mean().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0


def test_score_is_zero_on_its_own_map(folder: Path) -> None:
    condition = get("depth", model=str(folder))
    levels = (255 * pictures()).round().byte()
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in levels]
    own = torch.stack([torch.from_numpy(np.array(condition.extract(image))) for image in images])
    scores = condition.score(levels / 255, own.permute(0, 3, 1, 2) / 255)
    assert scores.max() < 1
    assert condition.score(levels / 255, 1 - own.permute(0, 3, 1, 2) / 255).min() > 20


def test_model_is_loaded_once(folder: Path) -> None:
    assert depth._load(str(folder), torch.device("cpu")) is depth._load(str(folder), torch.device("cpu"))


@pytest.mark.parametrize("model", [None, "missing"])
def test_failure_says_what_to_do_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str | None) -> None:
    monkeypatch.setattr(depth, "DEFAULT_MODEL", "icexport/no-such-depth-model")
    options = {} if model is None else {"model": tmp_path / model}
    with pytest.raises(ConditionError, match="without a network, run `hf download"):
        get("depth", **options).extract(Image.new("RGB", (16, 16)))


def test_other_model_types_are_refused(folder: Path, tmp_path: Path, processor: DPTImageProcessor) -> None:
    config = AutoConfig.for_model(
        "glpn", num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 8], num_attention_heads=[1, 1],
        patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[1, 1], decoder_hidden_size=8,
    )  # fmt: skip
    AutoModelForDepthEstimation.from_config(config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ConditionError, match="'glpn'; expected dpt or depth_anything"):
        get("depth", model=tmp_path).extract(Image.new("RGB", (16, 16)))
