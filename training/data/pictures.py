"""Pictures from files, and the same cut for a picture and its control map."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from icexport.errors import IcexportError
from icexport.host.pictures import to_rgb

_DAMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    LookupError,
    TypeError,
    EOFError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow's readers raise on damaged files."""

_ASPECT_TOLERANCE = 0.02


Content = bytes | Path | str
"""A picture's file: what is in it, its path, or a URL for fsspec."""


class BrokenPictureError(IcexportError):
    """A picture that cannot be used; the message says why."""


@dataclass(frozen=True)
class Cut:
    """A part of a picture, in shares of its width and height, and whether it is mirrored."""

    left: float
    top: float
    right: float
    bottom: float
    mirrored: bool = False

    def apply(self, picture: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
        """Cut this part out of ``picture``, scaled to ``size`` = (height, width) with ``resample``."""
        width, height = picture.size
        box = (self.left * width, self.top * height, self.right * width, self.bottom * height)
        part = picture.resize((size[1], size[0]), resample, box)
        return ImageOps.mirror(part) if self.mirrored else part


def decode(content: Content | None) -> Image.Image:
    """Return a picture of any mode, upright by its EXIF orientation, RGB of 8 bits, transparent parts on white.

    Args:
        content: the picture's file; None: there is none.

    Raises:
        BrokenPictureError: the picture is missing, empty, damaged, not a picture, or of an unknown range.
    """
    if content is None:
        raise BrokenPictureError("there is no picture")
    try:
        data = content if isinstance(content, bytes) else _file(content)
        if not data:
            raise BrokenPictureError("the file is empty")
        with Image.open(io.BytesIO(data)) as picture:
            return to_rgb(picture)
    except UnidentifiedImageError as error:
        raise BrokenPictureError("the file is not a picture that Pillow can read") from error
    except _DAMAGE as error:
        raise BrokenPictureError(str(error) or type(error).__name__) from error


def _file(place: Path | str) -> bytes:
    if isinstance(place, Path):
        return place.read_bytes()
    with fsspec.open(place, "rb") as file:
        return file.read()


def choose_cut(picture: Image.Image, size: tuple[int, int], fit: str, rng: np.random.Generator | None) -> Cut:
    """Return the part of a picture that is used.

    Args:
        picture: the whole picture.
        size: (height, width) of the target; what is cut out has its aspect.
        fit: ``crop``, ``random-crop`` or ``stretch``.
        rng: draws the place of ``random-crop``; None: the middle.
    """
    if fit == "stretch":
        return Cut(0, 0, 1, 1)
    width, height = picture.size
    scale = max(size[1] / width, size[0] / height)
    share_x, share_y = min(1.0, size[1] / (scale * width)), min(1.0, size[0] / (scale * height))
    x, y = rng.random(2) if rng is not None and fit == "random-crop" else (0.5, 0.5)
    left, top = float(x) * (1 - share_x), float(y) * (1 - share_y)
    return Cut(left, top, min(1.0, left + share_x), min(1.0, top + share_y))


def check_aspect(control: Image.Image, picture: Image.Image) -> None:
    """Check that a control map may be that of a picture; sizes may differ.

    Raises:
        BrokenPictureError: their aspects differ.
    """
    aspect, expected = control.width / control.height, picture.width / picture.height
    if abs(aspect / expected - 1) > _ASPECT_TOLERANCE:
        raise BrokenPictureError(
            f"the control map is {control.width} x {control.height} and the picture {picture.width} x {picture.height}"
        )
