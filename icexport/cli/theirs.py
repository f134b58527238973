"""Errors of libraries that are about the user's machine and files, in words of ours: no bug of icexport."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Situation:
    """What an error of a library means.

    Attributes:
        fits: tells whether an error, by the name of its class and its text, is of this kind.
        advice: what happened and what to do.
    """

    fits: Callable[[str, str], object]
    advice: str


def _says(pattern: str) -> Callable[[str, str], object]:
    return lambda _kind, text: re.search(pattern, text)


_NETWORK = ("ConnectError", "ConnectTimeout", "ConnectionError", "ReadTimeout", "MaxRetryError")

_SITUATIONS = (
    Situation(
        _says(r"No space left on device|os error 28|PytorchStreamWriter failed|Disk quota exceeded"),
        "The disk is full. Nothing half-written is left. Free some space, or choose another folder.",
    ),
    Situation(
        _says(r"DataLoader worker .*(killed by signal|exited unexpectedly)"),
        "A process that reads the training data was ended from outside, most often because the memory was full. Train "
        "with fewer of them (--set data.workers=0) or a smaller batch; a started run goes on where it was.",
    ),
    Situation(
        _says(r"unable to mmap|Cannot allocate memory|unable to open shared memory object"),
        "The memory is full, or the shared memory of this container is too small (docker run --shm-size). Free some, "
        "or train with --set data.workers=0.",
    ),
    Situation(
        lambda kind, _text: kind == "SafetensorError",
        "A file of weights is damaged or cut short. Copy or download it again.",
    ),
    Situation(
        lambda kind, _text: kind in _NETWORK,
        "The network cannot be reached. Give local folders in place of Hub ids, or try again.",
    ),
    Situation(
        lambda kind, _text: kind == "UnidentifiedImageError",
        "A file is no picture that Pillow reads, or is damaged.",
    ),
)


def explain(error: BaseException) -> str | None:
    """Return what an error of a library means to the user; None: nothing that is known here."""
    seen: BaseException | None = error
    while seen is not None:  # libraries wrap what they meet
        kind, text = type(seen).__name__, str(seen)
        for situation in _SITUATIONS:
            if situation.fits(kind, text):
                return f"{situation.advice} ({kind}: {' '.join(text.split())})"
        seen = seen.__cause__ or seen.__context__
    return None
