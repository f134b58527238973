"""Picture files: read with care, fitted to a size, written in one go."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from icexport.errors import UsageError
from icexport.host.files import whole
from icexport.host.pixels import DEEP, in_range, plain, scaled, to_pixels

Fit = Literal["crop", "pad", "stretch"]

MAX_PIXELS = 64_000_000
"""Largest picture that is read: beyond what cameras give, and 200 MB once unpacked."""


def read_picture(path: Path, transparent: str = "white") -> Image.Image:
    """Return a picture file as ``icexport.host.pixels.plain`` gives it: RGB, or grey floats if it has more bits.

    Args:
        path: file in any format that Pillow reads; of several frames the first.
        transparent: colour of transparent parts.

    Raises:
        UsageError: the file is no picture, is damaged, has too many pixels, or values of an unknown range.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(path)
        pixels = image.width * image.height
        if pixels <= MAX_PIXELS:
            image.load()
    except Image.DecompressionBombError:
        pixels = 2 * MAX_PIXELS
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise UsageError(f"{path} cannot be read as a picture: {error}. Give a PNG, JPEG or WebP file.") from error
    if pixels > MAX_PIXELS:
        raise UsageError(
            f"{path} has more than {MAX_PIXELS // 10**6} million pixels, the most that is read. Scale it down first."
        )
    try:
        return plain(image, transparent)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def fit(image: Image.Image, width: int, height: int, how: Fit) -> Image.Image:
    """Scale a picture to ``width`` x ``height``: cut the rest off, distort, or (pad) stay within."""
    if how == "crop":
        return in_range(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))
    if how == "pad":
        scale = min(width / image.width, height / image.height)
        width, height = max(1, round(scale * image.width)), max(1, round(scale * image.height))
    return scaled(image, width, height)


def pad(control_map: Image.Image, width: int, height: int) -> Image.Image:
    """Return a control map in the middle of a black one, which controls nothing."""
    padded = Image.new(control_map.mode, (width, height))
    padded.paste(control_map, ((width - control_map.width) // 2, (height - control_map.height) // 2))
    return padded


def save_png(image: Image.Image, path: Path, text: Mapping[str, object]) -> None:
    """Write a PNG with text chunks, of 16 bits for grey floats in [0,1]; it appears complete or not at all."""
    if image.mode == DEEP:
        image = Image.fromarray((65535 * np.asarray(image)).round().astype(np.uint16))
    info = PngInfo()
    for name, value in text.items():
        info.add_text(name, str(value))
    with whole(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to RGB of 8 bits, rounding what has more; transparent parts on white.

    Raises:
        UsageError: its values are of an unknown range.
    """
    found = plain(image)
    return to_image(to_pixels(found)[0]) if found.mode == DEEP else found


def to_image(pixels: Tensor) -> Image.Image:
    """Return a map ``[1|3,H,W]`` in [0,1] as an RGB picture, rounded to 8 bits."""
    levels = (255 * round_to_8bit(pixels)).round().byte().expand(3, -1, -1)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())


def round_to_8bit(pixels: Tensor) -> Tensor:
    """Clip to [0,1] and round to multiples of 1/255, as a saved picture is."""
    return (255 * pixels.clamp(0, 1)).round() / 255
