"""Schedulers by name."""

from __future__ import annotations

import json
from typing import Any

from diffusers import schedulers
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from icexport.bundle.store import Bundle
from icexport.errors import UsageError


def load_scheduler(bundle: Bundle) -> SchedulerMixin:
    """The scheduler of the class that its config names.

    Raises:
        BundleError: the class is not one of diffusers' schedulers.
    """
    folder = bundle.folder("scheduler")
    name = json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))["_class_name"]
    return scheduler_class(name).from_pretrained(folder)


def scheduler_class(name: str) -> Any:
    """Diffusers' scheduler class of this name, with or without ``Scheduler`` at its end.

    Raises:
        UsageError: diffusers has no such scheduler; those that it has are listed.
    """
    known = [n for n in dir(schedulers) if n.endswith("Scheduler")]  # a lazy module: vars() has only what was used
    for candidate in (name, f"{name}Scheduler"):
        if candidate in known:
            return getattr(schedulers, candidate)
    raise UsageError(f"diffusers has no scheduler {name!r}. Known: {', '.join(known)}.")
