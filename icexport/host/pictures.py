"""Pictures of ``icexport generate``: read with care, fitted to a size, written in one go."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from icexport.errors import ConditionError, UsageError
from icexport.host.files import whole

Fit = Literal["crop", "pad", "stretch"]

MAX_PIXELS = 64_000_000
"""Largest picture that is read: beyond what cameras give, and 200 MB once unpacked."""


def read_picture(path: Path, transparent: str = "white") -> Image.Image:
    """Return a picture file as RGB, turned upright as its EXIF data says.

    Args:
        path: file in any format that Pillow reads; of several frames the first.
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
    """Return a control map in the middle of a black one, which controls nothing."""
    padded = Image.new("RGB", (width, height))
    padded.paste(control_map, ((width - control_map.width) // 2, (height - control_map.height) // 2))
    return padded


def save_png(image: Image.Image, path: Path, text: Mapping[str, object]) -> None:
    """Write a PNG with text chunks; the file appears complete or not at all."""
    info = PngInfo()
    for name, value in text.items():
        info.add_text(name, str(value))
    with whole(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any 8-bit mode to RGB, transparent parts on white.

    Raises:
        ConditionError: if it has more than 8 bits a channel, which Pillow would clip without a word.
    """
    if image.mode.startswith(("I", "F")):
        raise ConditionError(f"The picture has mode {image.mode!r} (more than 8 bits); save it with 8 bits a channel.")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def to_pixels(image: Image.Image) -> Tensor:
    """Return an RGB picture as ``[1,3,H,W]`` float32 in [0,1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def to_image(pixels: Tensor) -> Image.Image:
    """Return a map ``[1|3,H,W]`` in [0,1] as an RGB picture, rounded to 8 bits."""
    levels = (255 * round_to_8bit(pixels)).round().byte().expand(3, -1, -1)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())


def round_to_8bit(pixels: Tensor) -> Tensor:
    """Clip to [0,1] and round to multiples of 1/255, as a saved picture is."""
    return (255 * pixels.clamp(0, 1)).round() / 255
