"""Pictures mean the same in every form in which people have them; what could mean two things is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from icexport.conditions.maps import ready_map
from icexport.errors import UsageError
from icexport.host.pictures import fit, read_picture, save_png
from icexport.host.pixels import DEEP, as_pictures, plain, scaled, to_pixels
from icexport.runtime.pipeline import InnerControlPipeline

SIZE = (16, 16)
LEVELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
GREY = LEVELS[..., 0]
COLOUR = torch.from_numpy(LEVELS).permute(2, 0, 1).float()[None] / 255
GREYS = (torch.from_numpy(GREY).float() / 255).expand(1, 3, -1, -1)


def pixels(value: Any, **options: Any) -> Tensor:
    found = as_pictures(value, **options)
    return found if isinstance(found, Tensor) else torch.cat([to_pixels(image) for image in found])


def with_alpha(image: Image.Image) -> Image.Image:
    alpha = Image.new("L", SIZE, 255)
    alpha.paste(0, (0, 0, 8, 16))
    image.putalpha(alpha)
    return image


def turned() -> Image.Image:
    """As a camera saves what it took while it was turned by 90 degrees."""
    image = Image.fromarray(LEVELS).transpose(Image.Transpose.ROTATE_90)
    image.getexif()[0x0112] = 6
    return image


def palette() -> Image.Image:
    image = Image.fromarray(LEVELS).quantize(16)
    image.info["transparency"] = 3
    return image


FILES: dict[str, tuple[str, Callable[[], Image.Image]]] = {
    "RGB": ("png", lambda: Image.fromarray(LEVELS)),
    "grey": ("png", lambda: Image.fromarray(GREY)),
    "black and white": ("png", lambda: Image.fromarray(GREY > 100)),
    "RGBA": ("png", lambda: with_alpha(Image.fromarray(LEVELS))),
    "LA": ("png", lambda: with_alpha(Image.fromarray(GREY))),
    "palette": ("png", lambda: Image.fromarray(LEVELS).quantize(16)),
    "palette with transparency": ("png", palette),
    "16 bits": ("png", lambda: Image.fromarray(GREY.astype(np.uint16) * 201 + 7)),
    "16 bits, TIFF": ("tiff", lambda: Image.fromarray(GREY.astype(np.uint16) * 201 + 7)),
    "floats": ("tiff", lambda: Image.fromarray(GREY.astype(np.float32) / 255)),
    "CMYK": ("tiff", lambda: Image.fromarray(LEVELS).convert("CMYK")),
    "YCbCr": ("jpg", lambda: Image.fromarray(LEVELS)),
    "turned": ("png", turned),
}


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> InnerControlPipeline:
    return InnerControlPipeline.from_pretrained(tiny_bundle, backend="torch")


@pytest.mark.parametrize("name", FILES)
def test_command_line_and_python_agree(pipe: InnerControlPipeline, tmp_path: Path, name: str) -> None:
    suffix, make = FILES[name]
    path = tmp_path / f"map.{suffix}"
    image = make()
    image.save(path, exif=image.getexif())

    theirs = to_pixels(ready_map(path, SIZE, "stretch", {}))

    with Image.open(path) as opened:
        ours, _ = pipe._prepare(opened, "a", None, (16, 16), 1)
    assert torch.equal(ours, theirs)
    with Image.open(path) as opened:
        assert torch.equal(pipe._prepare(opened, "a", None, (None, None), 1)[0], theirs)


def test_the_kinds_mean_what_they_say() -> None:
    assert torch.equal(pixels(Image.fromarray(LEVELS)), COLOUR)
    assert torch.equal(pixels(Image.fromarray(GREY)), GREYS)
    assert torch.equal(pixels(turned()), COLOUR)
    deep = pixels(Image.fromarray(GREY.astype(np.uint16) * 257))
    assert torch.allclose(deep, GREYS, atol=1e-7)
    flat = pixels(with_alpha(Image.fromarray(LEVELS)))
    assert not flat[..., :8].any(), "transparent parts of a control map control nothing"
    assert torch.equal(flat[..., 8:], COLOUR[..., 8:])
    assert (pixels(with_alpha(Image.fromarray(LEVELS)), transparent="white")[..., :8] == 1).all()


CHW = torch.from_numpy(LEVELS).permute(2, 0, 1)
ARRAYS: dict[str, tuple[Any, Tensor]] = {
    "HWC uint8": (LEVELS, COLOUR),
    "CHW uint8": (CHW.numpy(), COLOUR),
    "HWC float32": (LEVELS.astype(np.float32) / 255, COLOUR),
    "HWC float64": (LEVELS / 255, COLOUR),
    "HW uint8": (GREY, GREYS),
    "HW1 uint8": (GREY[..., None], GREYS),
    "HW bool": (GREY > 127, (torch.from_numpy(GREY) > 127).float().expand(1, 3, -1, -1)),
    "HW uint16": (GREY.astype(np.uint16) * 257, GREYS),
    "big-endian": (GREY.astype(">u2") * 257, GREYS),
    "reversed": (LEVELS[::-1], COLOUR.flip(2)),
    "BHWC uint8": (np.stack([LEVELS, LEVELS[::-1]]), torch.cat([COLOUR, COLOUR.flip(2)])),
    "torch CHW uint8": (CHW, COLOUR),
    "torch CHW float": (COLOUR[0], COLOUR),
    "torch CHW float16": (COLOUR[0].half(), COLOUR.half().float()),
    "torch BCHW": (torch.cat([COLOUR] * 2), torch.cat([COLOUR] * 2)),
    "torch HWC uint8": (torch.from_numpy(LEVELS), COLOUR),
    "torch HW uint8": (torch.from_numpy(GREY), GREYS),
    "torch uint16": (torch.from_numpy(GREY.astype(np.uint16) * 257), GREYS),
    "torch with gradients": (COLOUR.clone().requires_grad_(), COLOUR),
    "a list": ([Image.fromarray(LEVELS), LEVELS, COLOUR[0]], torch.cat([COLOUR] * 3)),
    "a list of batches": ([torch.cat([COLOUR] * 2), COLOUR], torch.cat([COLOUR] * 3)),
    "rounding": (COLOUR[0] * (1 + 4e-6), (COLOUR * (1 + 4e-6)).clamp(0, 1)),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(name: str) -> None:
    value, expected = ARRAYS[name]
    found = pixels(value)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert torch.allclose(found, expected, atol=1e-7, rtol=0)


def test_arrays_with_transparency() -> None:
    alpha = np.full((16, 16, 1), 255, np.uint8)
    alpha[:, :8] = 0
    found = pixels(np.concatenate([LEVELS, alpha], 2))
    assert torch.equal(found, pixels(with_alpha(Image.fromarray(LEVELS))))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (COLOUR[0] * 2 - 1, r"values from -\S+ to \S+, outside of \[0,1\]: if it is in \[-1,1\], give \(x \+ 1\) / 2"),
        (LEVELS.astype(np.float32), "if it is in 0 to 255, divide it by 255, or give uint8"),
        (LEVELS.astype(np.float32) * 257, "if it is in 0 to 65535, divide it by 65535"),
        (LEVELS.astype(np.float32) - 500, r"outside of \[0,1\]: bring it to \[0,1\]"),
        (COLOUR[0] * 1.01, r"values from 0 to 1\.01"),
        (LEVELS.astype(np.int64), "holds int64, whose range is not known: give uint8"),
        (torch.from_numpy(LEVELS.astype(np.int32)), "holds int32"),
        (COLOUR.log()[0], "NaN or infinite"),
        (torch.full((3, 16, 16), float("nan")), "NaN or infinite"),
        (Image.fromarray(np.full((16, 16), np.nan, np.float32)), "NaN or infinite"),
        (Image.fromarray(GREY.astype(np.float32)), "divide it by 255"),
        (Image.new("I", SIZE, 70_000), "integers of 32 bits, whose range is not known"),
        (np.zeros((3, 64, 3), np.uint8), r"could be \[C,H,W\] or \[H,W,C\]"),
        (np.zeros((16, 16, 2), np.uint8), r"no axis has the length of channels \(1, 3 or 4\)"),
        (np.zeros((5, 16, 16), np.uint8), r"A batch of grey pictures is \[B,1,H,W\]"),
        (np.zeros(16, np.uint8), r"has shape \(16,\)"),
        (np.zeros((0, 3, 16, 16), np.uint8), "has shape"),
        (np.array([["a"]]), "holds int64"),
        ([], "an empty list"),
        ("map.png", r"image is str: give a PIL picture.*PIL\.Image\.open"),
        ([Image.fromarray(LEVELS), 3], r"image\[1\] is int"),
        ([np.zeros((16, 16), np.uint8), np.zeros((8, 8), np.uint8)], r"several sizes: \(16, 16\) and \(8, 8\)"),
    ],
)
def test_what_is_not_clear_is_refused(pipe: InnerControlPipeline, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        as_pictures(value)
    with pytest.raises(UsageError, match=message):
        pipe("a", image=value, num_inference_steps=1)


def test_the_message_names_the_picture_of_a_list() -> None:
    with pytest.raises(UsageError, match=r"image\[1\] holds NaN"):
        as_pictures([COLOUR[0], torch.full((3, 16, 16), float("nan"))])


def test_deep_pictures_keep_their_digits(tmp_path: Path) -> None:
    """Fitted, padded and saved: 16 bits stay 16 bits, and a filter does not leave the range."""
    levels = np.zeros((32, 32), np.uint16)
    levels[::2] = 65535
    save_png(Image.fromarray(levels.astype(np.float32) / 65535), tmp_path / "deep.png", {})
    image = read_picture(tmp_path / "deep.png")

    assert image.mode == DEEP
    assert np.array_equal(np.asarray(Image.open(tmp_path / "deep.png")), levels)
    for how in ("crop", "pad", "stretch"):
        found = np.asarray(fit(image, 24, 24, how))
        assert (found.min() >= 0, found.max() <= 1) == (True, True)
    assert np.asarray(scaled(image, 24, 20)).shape == (20, 24)
    assert plain(Image.open(tmp_path / "deep.png")).mode == DEEP
