"""Control maps from picture files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL.Image import Image

from icexport.conditions.base import Condition
from icexport.errors import UsageError
from icexport.host.pictures import Fit, fit, pad, read_picture


def extracted_map(condition: Condition, path: Path, size: tuple[int, int], how: Fit) -> Image:
    """Return what the condition sees in a picture file, brought to ``size`` (width, height).

    Raises:
        UsageError: the file cannot be read.
        ConditionError: the condition lacks weights.
    """
    # Padded after the extraction, or the edge of the padding would be in the map.
    return pad(condition.extract(fit(read_picture(path), *size, how)), *size)


def ready_map(path: Path, size: tuple[int, int], how: Fit, options: Mapping[str, object]) -> Image:
    """Return a file that is a control map already, brought to ``size`` (width, height).

    Args:
        path: path of the file.
        size: size in pixels.
        how: how the file is brought to it.
        options: options of an extraction, which there is none of: any is refused.

    Raises:
        UsageError: the file cannot be read, or there are options.
    """
    if options:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in options)
        raise UsageError(f"{flags} belongs to the extraction from --image; a --control-map is used as it is.")
    return pad(fit(read_picture(path, transparent="black"), *size, how), *size)
