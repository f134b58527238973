"""Pictures of ``icexport generate``: read with care, fitted to a size, written in one go."""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from icexport.conditions.base import to_rgb
from icexport.errors import UsageError

Fit = Literal["crop", "pad", "stretch"]

MAX_PIXELS = 64_000_000
"""Largest picture that is read: beyond what cameras give, and 200 MB once unpacked."""


def read_picture(path: Path, transparent: str = "white") -> Image.Image:
    """A picture file as RGB, turned upright as its EXIF data says.

    Args:
        path: any format that Pillow reads; of several frames the first.
        transparent: colour of transparent parts.

    Raises:
        UsageError: the file is no picture, is damaged, or has too many pixels or more than 8 bits a channel.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(path)
        pixels = image.width * image.height
        if pixels <= MAX_PIXELS:
            image = ImageOps.exif_transpose(image)
            image.load()
    except Image.DecompressionBombError:
        pixels = 2 * MAX_PIXELS
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise UsageError(f"{path} cannot be read as a picture: {error}. Give a PNG, JPEG or WebP file.") from error
    if pixels > MAX_PIXELS:
        raise UsageError(
            f"{path} has more than {MAX_PIXELS // 10**6} million pixels, the most that is read. Scale it down first."
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, transparent), rgba)
    return to_rgb(image)


def fit(image: Image.Image, width: int, height: int, how: Fit) -> Image.Image:
    """Scale a picture to ``width`` x ``height``: cut the rest off, distort, or (pad) stay within."""
    if how == "crop":
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    if how == "pad":
        scale = min(width / image.width, height / image.height)
        width, height = max(1, round(scale * image.width)), max(1, round(scale * image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS)


def pad(control_map: Image.Image, width: int, height: int) -> Image.Image:
    """A control map in the middle of a black one, which controls nothing."""
    padded = Image.new("RGB", (width, height))
    padded.paste(control_map, ((width - control_map.width) // 2, (height - control_map.height) // 2))
    return padded


def save_png(image: Image.Image, path: Path, text: Mapping[str, object]) -> None:
    """Write a PNG with text chunks; the file appears complete or not at all."""
    info = PngInfo()
    for name, value in text.items():
        info.add_text(name, str(value))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        image.save(temporary, format="PNG", pnginfo=info)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
