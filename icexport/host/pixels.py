"""Whatever people give as a picture, as one thing: PIL pictures of any mode, arrays and tensors, one or many.

Nothing is clipped, and nothing is guessed: what could mean two things is refused, with what it looks like and how to
say it. Values are in [0,1] afterwards: 8 bits divided by 255, 16 bits by 65535.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from icexport.errors import UsageError

DEEP = "F"
"""Mode of a grey picture of more than 8 bits, once it is read: floats in [0,1]."""

_ROUNDING = 1e-5
"""How far a float may lie outside of [0,1]: resizing and float16 round that much."""
_WHOLE = {torch.uint8: 255, torch.uint16: 65535}


def plain(image: Image.Image, transparent: str = "white") -> Image.Image:
    """Return a picture of any mode as RGB of 8 bits, or as grey floats in [0,1] if it has more; upright.

    Args:
        image: the picture; where its EXIF data says that it was turned, it is turned back.
        transparent: colour of transparent parts.

    Raises:
        UsageError: its values are outside of [0,1], or integers of more than 16 bits, whose range nobody knows.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.asarray(image).astype(np.float32) / 65535)
    if image.mode == DEEP:
        _check_range(np.asarray(image), "The picture")
        return image
    if image.mode.startswith("I"):
        raise UsageError(
            f"The picture has mode {image.mode!r}: integers of 32 bits, whose range is not known. Divide them by the "
            "largest value that they can have, and give floats in [0,1], or save it with 8 or 16 bits."
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, transparent), rgba)
    return image.convert("RGB")


def scaled(image: Image.Image, width: int, height: int) -> Image.Image:
    """Return an RGB or grey float picture of another size."""
    return in_range(image.resize((width, height), Image.Resampling.LANCZOS))


def in_range(image: Image.Image) -> Image.Image:
    """Return a grey float picture without what a filter overshot, as pictures of 8 bits are by themselves."""
    return Image.fromarray(np.asarray(image).clip(0, 1)) if image.mode == DEEP else image


def as_pictures(
    value: Any,
    name: str = "image",
    transparent: str = "black",
    size: tuple[int | None, int | None] = (None, None),
) -> list[Image.Image] | Tensor:
    """Return what people give as pictures in one of two forms.

    Args:
        value: a PIL picture of any mode; an array or tensor ``[H,W]``, ``[H,W,C]``, ``[C,H,W]`` or a batch of these,
            C being 1, 3 or 4 (with transparency): uint8, uint16, bool, or floats in [0,1]; or a list of any of them.
        name: what the argument is called, for messages.
        transparent: colour of transparent parts.
        size: (height, width) to which PIL pictures of more than 8 bits are brought; None: their own.

    Returns:
        RGB pictures of 8 bits if all of them are such, else float32 ``[B,3,H,W]`` in [0,1].

    Raises:
        UsageError: it is none of these, its axes or its range could mean several things, a value is not finite, or
            the pictures of a list have several sizes.
    """
    items = list(value) if isinstance(value, list | tuple) else [value]
    if not items:
        raise UsageError(f"{name} is an empty list.")
    label = f"{name}[{{}}]" if isinstance(value, list | tuple) else name
    found: list[Image.Image | Tensor] = [
        _one(item, label.format(i), transparent, size) for i, item in enumerate(items)
    ]
    pictures = [picture for picture in found if isinstance(picture, Image.Image)]
    if len(pictures) == len(found):
        return pictures
    tensors = [to_pixels(item) if isinstance(item, Image.Image) else item for item in found]
    sizes = list(dict.fromkeys(tuple(tensor.shape[2:]) for tensor in tensors))
    if len(sizes) > 1:
        raise UsageError(f"{name} has pictures of several sizes: {sizes[0]} and {sizes[1]} (height, width).")
    return torch.cat([tensor.to(tensors[0].device) for tensor in tensors])


def to_pixels(image: Image.Image) -> Tensor:
    """Return an RGB picture, or a grey one of floats in [0,1], as ``[1,3,H,W]`` float32 in [0,1]."""
    if image.mode == DEEP:
        return torch.from_numpy(np.array(image)).expand(1, 3, -1, -1).contiguous()
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def _one(item: Any, name: str, transparent: str, size: tuple[int | None, int | None]) -> Image.Image | Tensor:
    """Return a picture of 8 bits, or ``[B,3,H,W]``."""
    if isinstance(item, Image.Image):
        try:
            image = plain(item, transparent)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error
        if image.mode != DEEP:
            return image
        height, width = size
        return to_pixels(scaled(image, width or image.width, height or image.height))
    if isinstance(item, Tensor):
        return _from_array(item.detach(), name, transparent)
    if isinstance(item, np.ndarray):
        return _from_array(torch.from_numpy(_known_to_torch(item)), name, transparent)
    raise UsageError(
        f"{name} is {type(item).__name__}: give a PIL picture, a NumPy array, a torch tensor, or a list of them. A "
        "file is opened with PIL.Image.open(FILE)."
    )


def _known_to_torch(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return an array whose type torch has, with its byte order and strides."""
    if array.dtype.kind not in "buif":
        return np.zeros(array.shape, np.int64)  # refused by its type below
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))


def _from_array(array: Tensor, name: str, transparent: str) -> Tensor:
    batch = _batch_of(array, name)
    values = _in_range(batch, name)
    if values.shape[1] == 4:
        background = 0.0 if transparent == "black" else 1.0
        alpha = values[:, 3:]
        values = values[:, :3] * alpha + background * (1 - alpha)
    return values.expand(-1, 3, -1, -1).contiguous()


def _batch_of(array: Tensor, name: str) -> Tensor:
    """Return ``[B,C,H,W]`` of an array whose axes are told by their lengths: C is 1, 3 or 4."""
    shape = tuple(array.shape)
    if array.ndim == 2:
        return array[None, None]
    if array.ndim not in (3, 4) or 0 in shape:
        raise UsageError(f"{name} has shape {shape}: give [H,W], [H,W,C], [C,H,W], or a batch of these.")
    if array.ndim == 3:
        array = array[None]
    first, last = array.shape[1] in (1, 3, 4), array.shape[3] in (1, 3, 4)
    if first and last:
        raise UsageError(f"{name} has shape {shape}, which could be [C,H,W] or [H,W,C]: give a PIL picture.")
    if not first and not last:
        raise UsageError(
            f"{name} has shape {shape}: no axis has the length of channels (1, 3 or 4). A batch of grey pictures is "
            "[B,1,H,W] or [B,H,W,1]."
        )
    return array if first else array.permute(0, 3, 1, 2)


def _in_range(batch: Tensor, name: str) -> Tensor:
    """Return float32 in [0,1] of whole numbers of 8 or 16 bits, booleans, or floats in that range."""
    if batch.is_floating_point():
        values = batch.float()
        _check_range(values, name)
        return values.clamp(0, 1)
    if batch.dtype == torch.bool:
        return batch.float()
    largest = _WHOLE.get(batch.dtype)
    if largest is None:
        raise UsageError(
            f"{name} holds {str(batch.dtype).removeprefix('torch.')}, whose range is not known: give uint8 (0 to "
            "255), uint16 (0 to 65535), bool, or floats in [0,1]."
        )
    return batch.to(torch.int32).float() / largest


def _check_range(values: Any, name: str) -> None:
    """Refuse floats that are not finite or outside of [0,1], with what they look like."""
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):  # a NaN anywhere makes both of them NaN
        raise UsageError(f"{name} holds NaN or infinite values.")
    if low >= -_ROUNDING and high <= 1 + _ROUNDING:
        return
    advice = "bring it to [0,1]"
    if low >= -1 - _ROUNDING and high <= 1 + _ROUNDING:
        advice = "if it is in [-1,1], give (x + 1) / 2"
    elif low >= 0 and high <= 255:
        advice = "if it is in 0 to 255, divide it by 255, or give uint8"
    elif low >= 0 and high <= 65535:
        advice = "if it is in 0 to 65535, divide it by 65535, or give uint16"
    raise UsageError(f"{name} has values from {low:.4g} to {high:.4g}, outside of [0,1]: {advice}.")
