from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.training.data.making import picture, png
from training.data.config import DataConfig
from training.data.pictures import BrokenPictureError, Cut, choose_cut, decode
from training.data.samples import Sample, read


def test_transparent_parts_become_white() -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    assert list(decode(png(image)).tobytes()) == [255, 0, 0, 255, 255, 255]


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA"])
def test_other_8_bit_modes_are_read(mode: str, tmp_path: Path) -> None:
    file = tmp_path / "x.tif"
    Image.new("RGB", (3, 2), "white").convert(mode).save(file)
    image = decode(file)
    assert (image.mode, image.size) == ("RGB", (3, 2))
    assert (np.asarray(image) == 255).all()


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image = Image.new("RGB", (20, 10), "black")
    image.paste("white", (0, 0, 10, 10))
    image.save(tmp_path / "x.jpg", exif=exif)
    turned = np.asarray(decode(tmp_path / "x.jpg"))
    assert turned.shape == (20, 10, 3)
    assert turned[3].mean() > 200
    assert turned[16].mean() < 50


def tiff(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="TIFF")
    return buffer.getvalue()


def test_deep_pictures_are_rounded() -> None:
    image = decode(png(Image.fromarray(np.full((4, 4), 40_000, np.uint16))))
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", (156, 156, 156))


def half_a_picture() -> bytes:
    content = png(picture(1, 200, 200))
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no picture"),
        (b"", "empty"),
        (b"GIF89a but not really", "picture|GIF|image"),
        (b"just text", "not a picture"),
        (half_a_picture(), "truncated"),
        (tiff(Image.fromarray(np.full((4, 4), 40_000, np.int32))), "integers of 32 bits"),
        (Path("nowhere/missing.png"), "missing.png"),
    ],
)
def test_broken_pictures_say_why(content: bytes | Path | None, reason: str) -> None:
    with pytest.raises(BrokenPictureError, match=reason):
        decode(content)


def test_a_crop_is_the_middle_of_the_picture_and_fills_the_target() -> None:
    image = picture(3, 32, 16)
    part = choose_cut(image, (16, 16), "crop", None).apply(image, (16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(part), np.asarray(image)[:, 8:24])


def test_a_high_picture_is_cut_above_and_below_and_scaled() -> None:
    image = picture(3, 16, 64)
    cut = choose_cut(image, (16, 8), "crop", None)
    assert cut == Cut(0, 0.25, 1, 0.75)
    assert cut.apply(image, (16, 8), Image.Resampling.LANCZOS).size == (8, 16)


def test_stretch_uses_the_whole_picture() -> None:
    assert choose_cut(picture(0, 50, 20), (16, 16), "stretch", None) == Cut(0, 0, 1, 1)


def test_random_crops_reach_both_ends_and_stay_inside() -> None:
    image, rng = picture(0, 64, 16), np.random.default_rng(0)
    cuts = [choose_cut(image, (16, 16), "random-crop", rng) for _ in range(200)]
    assert all(c.left >= 0 and c.right <= 1 and c.right - c.left == pytest.approx(0.25) for c in cuts)
    assert min(c.left for c in cuts) < 0.02
    assert max(c.right for c in cuts) > 0.98


@pytest.mark.parametrize("scale", [1, 3])
def test_a_control_map_is_cut_and_mirrored_as_its_picture(scale: int) -> None:
    config = DataConfig("x", resolution=16, fit="random-crop", flip=True, control_column="c")
    image, mirrored = picture(2, 40, 16), set()
    control = image.resize((40 * scale, 16 * scale), Image.Resampling.NEAREST)
    for seed in range(8):
        record = read(Sample("a", png(image), "t", png(control)), config, np.random.default_rng(seed))
        assert record.control is not None
        pixels = np.asarray(record.image).astype(int)
        # Red falls from left to right only in a mirrored picture. A crop starts between two pixels: a little slack.
        mirrored.add(bool(pixels[0, 0, 0] > pixels[0, -1, 0]))
        assert abs(pixels - np.asarray(record.control)).mean() < 5
    assert mirrored == {False, True}


def test_a_control_map_of_another_shape_is_broken() -> None:
    config = DataConfig("x", resolution=16, control_column="c")
    with pytest.raises(BrokenPictureError, match="the control map is 20 x 24 and the picture 24 x 20"):
        read(Sample("a", png(picture(0)), "t", png(picture(0, 20, 24))), config, None)
    with pytest.raises(BrokenPictureError, match="control map: there is no picture"):
        read(Sample("a", png(picture(0)), "t"), config, None)


def test_one_of_several_captions_is_drawn_and_evaluation_takes_the_first() -> None:
    config, captions = DataConfig("x", resolution=16), ["one", "two"]
    sample = Sample("a", png(picture(0)), captions)
    assert read(sample, config, None).caption == "one"
    assert {read(sample, config, np.random.default_rng(seed)).caption for seed in range(9)} == {"one", "two"}
    for missing in (None, "", "  ", [], [None], 7):
        assert read(Sample("a", png(picture(0)), missing), config, None).caption == ""
