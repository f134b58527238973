"""What every kind of source gives, and how it becomes a picture with its caption and control map."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from training.data.config import DataConfig
from training.data.pictures import BrokenPictureError, Content, check_aspect, choose_cut, decode

logger = logging.getLogger(__name__)

BROKEN, NO_CAPTION = "broken picture", "no caption"
HOPELESS = 10_000
"""Broken pictures in a row after which nothing readable is expected any more."""

_LOGGED = 10


class Fault(NamedTuple):
    """What is wrong with one sample. ``kind`` is `BROKEN` (it is skipped) or `NO_CAPTION` (the prompt is empty)."""

    kind: str
    id: str
    reason: str


@dataclass(frozen=True)
class Sample:
    """One entry of a source, not yet decoded.

    Attributes:
        id: name of the sample in messages, the same in every run.
        image: the picture's file; None: it has none.
        caption: what the source has as caption.
        control: the ready control map, as ``image``.
    """

    id: str
    image: Content | None
    caption: Any
    control: Content | None = None


@dataclass(frozen=True)
class Record:
    """A picture, cut to size.

    Attributes:
        id: id of the picture's `Sample`.
        image: the picture, RGB.
        caption: the caption; empty if the picture has none.
        control: the control map, RGB, of the same size; None: the source has no control maps.
    """

    id: str
    image: Image.Image
    caption: str
    control: Image.Image | None

    @property
    def faults(self) -> list[Fault]:
        """What was wrong with it, although it can be used."""
        return [] if self.caption else [Fault(NO_CAPTION, self.id, "the prompt is empty")]


class Source(Protocol):
    """A data set, entry by entry, always in the same order."""

    def __iter__(self) -> Iterator[Sample | Fault]:
        """Go through once; a part that cannot be read at all is a fault."""


class Counts:
    """What was wrong with a data set so far, in this process. The first ten faults of a kind go to the log in full.

    Attributes:
        broken: reasons by id of the pictures that were skipped.
        without_caption: reasons by id of the pictures that were used with an empty prompt.
    """

    def __init__(self) -> None:
        self.broken: dict[str, str] = {}
        self.without_caption: dict[str, str] = {}

    def add(self, fault: Fault) -> None:
        """Note ``fault``; what is known already is not counted again."""
        known = self.broken if fault.kind == BROKEN else self.without_caption
        if fault.id in known:
            return
        known[fault.id] = fault.reason
        count = len(known)
        if count <= _LOGGED:
            logger.warning("%s: %s: %s", fault.kind.capitalize(), fault.id, fault.reason)
        elif count % _LOGGED == 0 and (count // _LOGGED).bit_count() == 1:
            logger.warning("%s: %d so far, the latest: %s: %s", fault.kind.capitalize(), count, fault.id, fault.reason)

    def summary(self) -> dict[str, int]:
        """Return the numbers alone, for a log's row."""
        return {"broken_pictures": len(self.broken), "without_caption": len(self.without_caption)}


def read(sample: Sample, config: DataConfig, rng: np.random.Generator | None) -> Record:
    """Decode a sample and cut it to size.

    Args:
        sample: what to read.
        config: how to cut it.
        rng: makes every random choice: caption, place and mirroring; None: first caption, middle, not mirrored.

    Raises:
        BrokenPictureError: the picture or its control map cannot be used.
    """
    caption = _caption(sample.caption, rng)
    picture = decode(sample.image)
    cut = choose_cut(picture, config.size, config.fit, rng)
    if rng is not None and config.flip:
        cut = replace(cut, mirrored=bool(rng.integers(2)))
    control = None
    if config.control_column is not None:
        try:
            control = decode(sample.control)
        except BrokenPictureError as error:
            raise BrokenPictureError(f"control map: {error}") from error
        check_aspect(control, picture)
        # Lanczos would ring around edges, which in a control map are the message.
        control = cut.apply(control, config.size, Image.Resampling.BILINEAR)
    return Record(sample.id, cut.apply(picture, config.size, Image.Resampling.LANCZOS), caption, control)


def _caption(value: Any, rng: np.random.Generator | None) -> str:
    """Return one stripped caption; empty if there is none."""
    if isinstance(value, list | tuple):
        if not value:
            return ""
        value = value[0 if rng is None else int(rng.integers(len(value)))]
    return value.strip() if isinstance(value, str) else ""
