"""Refuses, before the long work, what would end in a full disk or with the kernel's killer; tells how long it is."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engines.errors import OutOfMemoryError
from icexport.backends import table
from icexport.backends.footprint import Footprint
from icexport.builder.duration import Work, seconds_needed
from icexport.builder.options import BuildSpec
from icexport.errors import BundleError
from icexport.graphs.profile import Profile
from icexport.host.memory import available
from icexport.host.speed import convolution_rate
from icexport.models.precision import precision

logger = logging.getLogger(__name__)

_LIBRARIES = 0.8e9
"""What a build takes of memory whatever the model: libraries, and graphs while they are traced."""
_GATE = 0.62e9
"""What is left of it while the gate runs."""
_ALL_OUTPUTS = 1.26
"""What the gate takes beside weights, over what drawing takes: it reads every output, and holds the reference's."""


def check_room(folder: Path, spec: BuildSpec) -> None:
    """Tell how long a build takes and what it needs, and refuse it where that is not there.

    Args:
        folder: where it is written.
        spec: what to build.

    Raises:
        BundleError: the disk has too little room.
        OutOfMemoryError: the memory has.
        CheckpointError: the weights are damaged or cut short.
    """
    weights = spec.source.elements()
    copies = 1 + sum(table.get(name).copies_weights for name in spec.backends)
    disk = 1.1 * sum(weights.values()) * copies * precision(spec.dtype).bytes
    free = shutil.disk_usage(folder).free
    if free < disk:
        raise BundleError(
            f"{folder.parent} has {free / 1e9:.1f} GB free; this bundle needs about {disk / 1e9:.1f} GB. Nothing "
            "was changed. Free some space, or choose another --output."
        )
    memory, left = memory_needed(spec, weights), available()
    if memory is None:
        return
    if left < memory:
        raise OutOfMemoryError(
            f"This build takes about {memory / 1e9:.1f} GB of memory, and {left / 1e9:.1f} GB are free. With "
            "preflight=False or --no-preflight it is tried all the same"
        )
    configs = {part: spec.source.full_config(part) for part in ("unet", "vae", "controlnet", "text_encoder")}
    seconds = seconds_needed(
        Work.of(configs, spec.profile, spec.source.family),
        weights,
        precision(spec.dtype),
        convolution_rate(),
        backends=len(spec.backends),
        verify=spec.verify,
    )
    logger.info(
        "This build takes about %s here, %.1f GB of memory (%.1f GB are free) and %.1f GB of disk (%.1f GB are free).",
        _in_words(seconds),
        *(value / 1e9 for value in (memory, left, disk, free)),
    )


def _in_words(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes > 1 else "a minute"


def memory_needed(spec: BuildSpec, weights: Mapping[str, int]) -> float | None:
    """Return the bytes of memory that a build takes; None: not known for its backends.

    Most is taken by the gate, while it runs the largest engine on all rows of the largest size.

    Args:
        spec: what to build.
        weights: number of weights of each part of the model.
    """
    known = [footprint for name in spec.backends if (footprint := table.get(name).footprint) is not None]
    if not known:
        return None
    if not spec.verify:
        return _LIBRARIES
    configs = {part: spec.source.config(part) for part in ("unet", "vae")}
    return max(gate_needs(weights, configs, spec.profile, footprint, spec.dtype) for footprint in known)


def gate_needs(
    weights: Mapping[str, int],
    configs: Mapping[str, Mapping[str, Any]],
    profile: Profile,
    footprint: Footprint,
    dtype: str,
) -> float:
    """Return the bytes of memory that a build with its gate takes; see ``memory_needed``."""
    sample, picture = footprint.per_pixel(configs)
    pixels = max(pictures * height * width for pictures, height, width in profile.corners())
    running = {"controlnet": 2 * sample, "unet": 2 * sample, "vae": picture}
    most = max(
        count * footprint.weight[dtype] + _ALL_OUTPUTS * pixels * running.get(part, 0.0)
        for part, count in weights.items()
    )
    return max(_LIBRARIES, _GATE + most)
