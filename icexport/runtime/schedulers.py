"""Schedulers by name: diffusers' own, and short names for some of them with settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import schedulers
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from icexport.errors import UsageError

_CONFIG_NAME = "scheduler_config.json"


@dataclass(frozen=True)
class SchedulerChoice:
    """A scheduler under a name of its own.

    Attributes:
        name: name of the scheduler, as ``--scheduler`` takes it, in lower case.
        scheduler: class of diffusers.
        settings: config values that are set whatever the model says.
    """

    name: str
    scheduler: str
    settings: Mapping[str, Any] = field(default_factory=dict)


CHOICES = {
    choice.name: choice
    for choice in (
        SchedulerChoice("unipc", "UniPCMultistepScheduler"),
        SchedulerChoice("euler-a", "EulerAncestralDiscreteScheduler"),
        SchedulerChoice("dpm++", "DPMSolverMultistepScheduler"),
        SchedulerChoice("dpm++-karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    )
}


def load_scheduler(folder: Path, name: str | None = None) -> SchedulerMixin:
    """Return the scheduler that a folder's ``scheduler_config.json`` describes.

    Args:
        folder: folder of the scheduler.
        name: class to load it by, whatever its config says; None: the one that it names.

    Raises:
        UsageError: the class is not one of diffusers' schedulers.
    """
    config = json.loads((folder / _CONFIG_NAME).read_text(encoding="utf-8"))
    return scheduler_class(name or config["_class_name"]).from_config(config)


def settle_scheduler(folder: Path, name: str) -> None:
    """Let a scheduler's config name the class that it is loaded by, where it names another; see ``load_scheduler``."""
    if json.loads((folder / _CONFIG_NAME).read_text(encoding="utf-8")).get("_class_name") != name:
        load_scheduler(folder, name).save_pretrained(folder)


def choose_scheduler(name: str, own: SchedulerMixin) -> SchedulerMixin:
    """Return the scheduler called ``name``, with the noise schedule of the model's own one.

    Args:
        name: one of ``CHOICES``, or a class of diffusers with or without ``Scheduler`` at its end.
        own: the model's scheduler.

    Raises:
        UsageError: there is no such scheduler, none for this model (those that fit are listed), or one without its
            library.
    """
    choice = CHOICES.get(name.lower())
    wanted = scheduler_class(choice.scheduler if choice else name)
    if wanted not in own.compatibles:
        fitting = {kind.__name__: kind.__name__.removesuffix("Scheduler") for kind in own.compatibles}
        names = [choice.name for choice in CHOICES.values() if choice.scheduler in fitting]
        listed = ", ".join([*names, *sorted(fitting.values())])
        raise UsageError(f"--scheduler {name} does not fit this model. Those that do: {listed}.")
    try:
        return wanted.from_config(own.config, **(choice.settings if choice else {}))
    except ImportError as error:  # a scheduler that needs another library
        raise UsageError(f"--scheduler {name}: {' '.join(str(error).split())}") from error


def scheduler_class(name: str) -> Any:
    """Return diffusers' scheduler class of this name, with or without ``Scheduler`` at its end.

    Raises:
        UsageError: diffusers has no such scheduler; those that it has are listed.
    """
    known = [n for n in dir(schedulers) if n.endswith("Scheduler")]  # a lazy module: vars() has only what was used
    for candidate in (name, f"{name}Scheduler"):
        if candidate in known:
            return getattr(schedulers, candidate)
    raise UsageError(f"There is no scheduler {name!r}. Known: {', '.join([*CHOICES, *known])}.")
