"""From a bundle to any number of pictures and one report; what ``icexport generate`` does between input and output."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from icexport.bundle.store import Bundle
from icexport.errors import UsageError
from icexport.fidelity.report import FidelityReport
from icexport.host.pictures import Fit, fit, pad, read_picture
from icexport.runtime.pipeline import InnerControlPipeline
from icexport.runtime.schedulers import scheduler_class


def batches(bundle: Bundle, count: int) -> list[int]:
    """Split ``count`` pictures into calls that the bundle takes, as even as possible.

    Raises:
        UsageError: it cannot be done.
    """
    allowed = bundle.manifest.profile.batch
    calls = -(-count // allowed.max)
    sizes = [count // calls + (i < count % calls) for i in range(calls)]
    if sizes[-1] < allowed.min:
        raise UsageError(
            f"--num-images {count} cannot be split into calls of {allowed} pictures, as {bundle.path} takes them. "
            f"Give a multiple of {allowed.min}, or build with --batch-size 1:1:4."
        )
    return sizes


def control_picture(
    bundle: Bundle,
    source: Path,
    ready: bool,
    size: tuple[int, int],
    how: Fit,
    options: Mapping[str, float],
) -> Image:
    """A file as a control map of ``size`` (width, height): a ``ready`` one as it is, else extracted from the picture.

    Raises:
        UsageError: the file cannot be read, or the condition lacks an option.
    """
    if not ready:
        condition = bundle.condition(**options)
        # Padded after the extraction, or the edge of the padding would be in the map.
        return pad(condition.extract(fit(read_picture(source), *size, how)), *size)
    if options:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in options)
        raise UsageError(f"{flags} belongs to the extraction from --image; a --control-map is used as it is.")
    return pad(fit(read_picture(source, transparent="black"), *size, how), *size)


def load(bundle: Bundle, backend: str, device: str | None, scheduler: str | None) -> InnerControlPipeline:
    """The pipeline of a bundle, with its own or a named scheduler.

    Raises:
        UsageError: no such scheduler, none for this model (those that fit are listed), or one without its library.
    """
    pipe = InnerControlPipeline.from_pretrained(bundle, backend=backend, device=device)
    if scheduler is not None:
        wanted = scheduler_class(scheduler)
        if wanted not in pipe.scheduler.compatibles:
            names = ", ".join(sorted(kind.__name__ for kind in pipe.scheduler.compatibles))
            raise UsageError(f"--scheduler {scheduler} does not fit this model. Those that do: {names}.")
        try:
            pipe.scheduler = wanted.from_config(pipe.scheduler.config)
        except ImportError as error:  # a scheduler that needs another library
            raise UsageError(f"--scheduler {scheduler}: {' '.join(str(error).split())}") from error
    hidden = not sys.stderr.isatty() or not logging.getLogger("icexport").isEnabledFor(logging.INFO)
    pipe.set_progress_bar_config(disable=hidden, leave=False)
    return pipe


def draw(
    pipe: InnerControlPipeline, control: Image, seed: int, sizes: list[int], settings: dict[str, Any]
) -> tuple[list[Image], FidelityReport]:
    """All pictures and one report for them; picture i has the seed ``seed + i``, however they are split into calls."""
    images: list[Image] = []
    reports: list[FidelityReport] = []
    seeds = iter(range(seed, seed + sum(sizes)))
    for size in sizes:
        found: Any = pipe(
            settings["prompt"],
            image=control,
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance_scale"],
            negative_prompt=settings["negative_prompt"],
            num_images_per_prompt=size,
            generator=[torch.Generator().manual_seed(next(seeds)) for _ in range(size)],
            controlnet_conditioning_scale=settings["controlnet_scale"],
        )
        images += found.images
        reports.append(found.fidelity)
    return images, _joined(reports)


def _joined(reports: list[FidelityReport]) -> FidelityReport:
    """The reports of several calls as one."""
    scores = [score for report in reports for score in report.scores or []]
    steps = [
        replace(first, errors=[error for report in reports for error in report.steps[i].errors])
        for i, first in enumerate(reports[0].steps)
    ]
    return replace(reports[0], scores=scores, steps=steps, heat_map=None)
