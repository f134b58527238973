"""What holds for every condition: registry, options, picture modes, sizes, ranges, scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from icexport import conditions
from icexport.conditions.base import Condition
from icexport.errors import ConditionError, UsageError

WITHOUT_WEIGHTS = ("canny", "lineart")
SIZE = (50, 36)  # width, height


def scene(mode: str = "RGB") -> Image.Image:
    """A dark disc on a light ramp, in any mode."""
    y, x = np.mgrid[: SIZE[1], : SIZE[0]]
    levels = np.where((x - 25) ** 2 + (y - 18) ** 2 < 100, 30, 180 + x).astype(np.uint8)
    return Image.fromarray(levels).convert("RGB").convert(mode)


def test_registry() -> None:
    assert conditions.names() == ("canny", "hed", "lineart", "depth")
    for name in conditions.names():
        assert conditions.get(name).name == name


@pytest.mark.parametrize("name", conditions.names())
def test_every_condition_is_described(name: str) -> None:
    condition = conditions.get(name)
    assert condition.value_range == (0.0, 1.0)
    assert condition.polarity
    assert condition.metric
    assert condition.unit
    assert condition.higher_is_better is (name != "depth")


def test_unknown_condition_lists_the_known_ones() -> None:
    with pytest.raises(ConditionError, match=r"'pose'.*canny, hed, lineart, depth"):
        conditions.get("pose")


def test_unknown_option_lists_the_known_ones() -> None:
    canny = conditions.get("canny")
    with pytest.raises(ConditionError, match=r"'sigma'.*low_threshold, high_threshold"):
        canny.extract(scene(), sigma=2)
    assert issubclass(ConditionError, UsageError)


def test_options_bind_or_override() -> None:
    bound = conditions.get("canny", low_threshold=300, high_threshold=1500)
    called = conditions.get("canny").extract(scene(), low_threshold=300, high_threshold=1500)
    assert bound.extract(scene()).tobytes() == called.tobytes() != conditions.get("canny").extract(scene()).tobytes()


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA", "CMYK"])
def test_extract_takes_every_8bit_mode(name: str, mode: str) -> None:
    control_map = conditions.get(name).extract(scene(mode))
    assert control_map.mode == "RGB"
    assert control_map.size == SIZE
    pixels = np.array(control_map)
    assert (pixels == pixels[..., :1]).all()
    assert pixels.max() > 100


def palette_with_transparency() -> Image.Image:
    image = Image.new("P", SIZE, 0)
    image.putpalette([0, 0, 0, 255, 255, 255])
    image.info["transparency"] = 0
    return image


@pytest.mark.parametrize("image", [Image.new("RGBA", SIZE, (0, 0, 0, 0)), palette_with_transparency()])
def test_transparent_parts_are_white(image: Image.Image) -> None:
    image.paste(1 if image.mode == "P" else (255, 255, 255, 255), (10, 10, 30, 30))
    assert np.array(conditions.get("canny").extract(image)).max() == 0


def test_deep_pictures_are_rounded_not_clipped() -> None:
    levels = np.asarray(scene("L"))
    expected = np.asarray(conditions.get("canny").extract(scene("L")))
    assert expected.any()
    deep = Image.fromarray(levels.astype(np.uint16) * 257)
    for image in (deep, Image.fromarray(levels.astype(np.float32) / 255), levels, levels[..., None] / 255):
        assert np.array_equal(np.asarray(conditions.get("canny").extract(image)), expected)
    with pytest.raises(UsageError, match="integers of 32 bits, whose range is not known"):
        conditions.get("canny").extract(Image.new("I", SIZE))
    with pytest.raises(UsageError, match="image holds 2 pictures: extract them one by one"):
        conditions.get("canny").extract([scene("L")] * 2)


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
@pytest.mark.parametrize("shape", [(1, 3, 36, 50), (2, 3, 64, 64), (1, 3, 13, 90)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_extract_batch_shape_and_range(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    control_maps = conditions.get(name).extract_batch(pixels)
    assert control_maps.shape == shape
    assert control_maps.dtype == torch.float32
    assert control_maps.min() >= 0
    assert 0 < control_maps.max() <= 1


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_extract_batch_agrees_with_extract(name: str) -> None:
    pixels = torch.from_numpy(np.array(scene())).permute(2, 0, 1)[None] / 255
    batched = conditions.get(name).extract_batch(pixels)[0].permute(1, 2, 0)
    np.testing.assert_array_equal((255 * batched).round().numpy(), np.array(conditions.get(name).extract(scene())))


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_score_is_best_on_its_own_map_and_ignores_less_than_8_bits(name: str) -> None:
    condition = conditions.get(name)
    picture = torch.from_numpy(np.array(scene())).permute(2, 0, 1)[None] / 255
    own = torch.from_numpy(np.array(condition.extract(scene()))).permute(2, 0, 1)[None] / 255
    pictures = torch.cat([picture, picture + 0.4 / 255, picture.flip(-1).roll(9, -2)])
    scores = condition.score(pictures, own.expand(3, -1, -1, -1))
    assert scores.shape == (3,)
    assert scores[0].item() == scores[1].item() == pytest.approx(1, abs=1e-6)
    assert scores[2] < 0.8


@dataclass(frozen=True)
class Darkness(Condition):
    """Every level of the picture and every level of the reading moves the score."""

    name, metric, unit, higher_is_better = "darkness", "mean difference", "levels", False

    def _extract(self, pixels: torch.Tensor) -> torch.Tensor:
        return 1 - pixels.mean(1, keepdim=True).sqrt()

    def _compare(self, readings: torch.Tensor, control_maps: torch.Tensor) -> torch.Tensor:
        return 255 * (readings - control_maps).mean((1, 2, 3))


def saved(pixels: torch.Tensor, path: Path) -> Image.Image:
    """What is in the file once a picture ``[3,H,W]`` of any floats was saved."""
    levels = (255 * pixels.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(levels).save(path)
    return Image.open(path)


def loaded(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def test_score_is_what_anyone_computes_from_the_saved_files(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = 1.4 * torch.rand(4, 3, 2, 2, generator=generator) - 0.2
    control = torch.randint(256, (4, 1, 2, 2), generator=generator).expand(-1, 3, -1, -1) / 255
    scores = Darkness().score(pictures, control)
    for i, (picture, score) in enumerate(zip(pictures, scores, strict=True)):
        reading = Darkness().extract(saved(picture, tmp_path / f"{i}.png"))
        expected = 255 * (loaded(reading) - control[i]).mean()
        assert score.item() == pytest.approx(expected.item(), abs=1e-3)


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_a_picture_scores_as_its_file_does(name: str, tmp_path: Path) -> None:
    noise = 0.1 * torch.randn(3, SIZE[1], SIZE[0], generator=torch.Generator().manual_seed(0))
    picture = loaded(scene())[0] + noise
    condition, control = conditions.get(name), loaded(conditions.get(name).extract(scene()))
    file = loaded(saved(picture, tmp_path / "picture.png"))
    assert condition.score(picture[None], control).item() == condition.score(file, control).item()


@pytest.mark.parametrize(
    "pixels", [torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)]
)
def test_wrong_pixels_are_named(pixels: torch.Tensor) -> None:
    with pytest.raises(ConditionError, match=r"pixels is torch.*\[B,3,H,W\]"):
        conditions.get("canny").extract_batch(pixels)


def test_score_names_both_shapes() -> None:
    with pytest.raises(ConditionError, match=r"\(1, 3, 8, 8\).*\(2, 3, 8, 8\)"):
        conditions.get("canny").score(torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8))
