"""The held-out set: control maps as files, features of the real pictures, and what is wrong with the data."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icexport.conditions.base import Condition
from icexport.errors import UsageError
from icexport.host.pictures import save_png, to_image
from icexport.host.pixels import to_pixels
from icexport.progress import Progress, silent
from training.data.config import DataConfig
from training.data.records import Record, records
from training.evaluation.features import FeatureExtractor
from training.evaluation.generate import Item, file_name

logger = logging.getLogger(__name__)


@dataclass
class HeldOut:
    """A set that is judged on.

    Attributes:
        items: the conditions, in the order of the data.
        features: features ``[N,D]`` of the real pictures, by extractor.
        counts: what the result says of the data.
    """

    items: list[Item] = field(default_factory=list)
    features: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)


def prepare(
    data: DataConfig,
    condition: Condition,
    folder: Path,
    *,
    max_samples: int | None = None,
    batch_size: int = 4,
    device: str = "cpu",
    extractors: Sequence[FeatureExtractor] = (),
    progress: Progress = silent,
) -> HeldOut:
    """Go through the data once, and keep no picture in memory.

    Args:
        data: the data set; broken pictures are skipped and counted.
        condition: extracts the control maps that the set lacks.
        folder: folder where the control maps are written.
        max_samples: use the first so many usable pictures; None: all.
        batch_size: number of pictures that are read at once.
        device: device where control maps are extracted.
        extractors: extractors of the features.
        progress: told how far it is.

    Raises:
        UsageError: there is no usable picture, or two have one id.
        ConditionError: the condition lacks weights.
    """
    step = "read the data"
    progress(step)
    folder.mkdir(parents=True, exist_ok=True)
    found, held_out = records(data), HeldOut()
    parts: dict[str, list[Tensor]] = {extractor.name: [] for extractor in extractors}
    blank = []
    usable = itertools.islice(found, max_samples)
    total = min((count for count in (max_samples, found.length) if count is not None), default=None)
    while chunk := list(itertools.islice(usable, batch_size)):
        for extractor in extractors:
            parts[extractor.name].append(extractor([record.image for record in chunk]))
        for record, control in zip(chunk, _control_maps(condition, chunk, device), strict=True):
            path = folder / file_name(record.id)
            save_png(to_image(control), path, {"condition": condition.name})
            digest = hashlib.sha256(control.numpy().tobytes()).hexdigest()
            held_out.items.append(Item(record.id, record.caption, path, digest))
            if control.amin() == control.amax():
                blank.append(record.id)
        if total is not None:
            progress(step, len(held_out.items), total)
    _check_ids(held_out.items, data)
    if blank:
        logger.warning("%d control maps are blank, for instance that of %s", len(blank), blank[0])
    held_out.features = {name: torch.cat(features) for name, features in parts.items()}
    held_out.counts = {
        "source": data.source,
        "split": data.split,
        "conditions": len(held_out.items),
        "blank_control_maps": blank,
        **found.counts.summary(),
        "broken": found.counts.broken,
    }
    return held_out


@torch.no_grad()
def _control_maps(condition: Condition, chunk: Sequence[Record], device: str) -> Tensor:
    """Return control maps ``[N,3,H,W]`` on the CPU, multiples of 1/255; those of the data set where it has them."""
    ready = [record.control for record in chunk]
    if all(control is not None for control in ready):
        return torch.cat([to_pixels(control) for control in ready if control is not None])
    pixels = torch.cat([to_pixels(record.image) for record in chunk]).to(device)
    maps = condition.extract_batch(pixels).cpu()
    return torch.cat([to_pixels(to_image(control)) for control in maps])


def _check_ids(items: Sequence[Item], data: DataConfig) -> None:
    if not items:
        raise UsageError(f"{data.source} has no usable picture to judge on.")
    if repeated := [name for name, count in Counter(item.id for item in items).items() if count > 1]:
        raise UsageError(
            f"{data.source} has several pictures with one id, for instance {', '.join(map(repr, repeated[:5]))}: "
            "their files and seeds would be the same. Give each its own name."
        )
