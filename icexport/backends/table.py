"""The table of backends: which there are, which are usable here, and which one ``auto`` means."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from engines.base import require_device
from engines.errors import BackendUnavailableError
from icexport.backends.base import Backend
from icexport.backends.onnxruntime import OnnxRuntime
from icexport.backends.tensorrt import TensorRt, TensorRtRtx
from icexport.backends.torch_eager import TorchEager

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (TensorRt(), TensorRtRtx(), OnnxRuntime(), TorchEager())  # in the order in which "auto" tries them
}


def register(backend: Backend) -> None:
    """Make a backend known under its name, in the place of one that has it; ``auto`` tries it last."""
    BACKENDS[backend.name] = backend


def get(name: str) -> Backend:
    """Return the backend called ``name``.

    Raises:
        ValueError: there is no backend of this name; those that exist are listed.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose from: auto, {', '.join(BACKENDS)}.")
    return BACKENDS[name]


def available() -> tuple[str, ...]:
    """Return the names of the usable backends, in the order in which ``auto`` tries them."""
    return tuple(name for name, backend in BACKENDS.items() if backend.check().usable)


def resolve(name: str, device: str | torch.device = "cpu", among: Iterable[str] | None = None) -> str:
    """Turn a backend's name or ``"auto"`` into the name of a backend that can run on ``device``.

    ``auto`` takes the first usable one of ``among`` and logs which and why. A named backend is never replaced.

    Args:
        name: name of a backend, or ``auto``.
        device: ``cpu``, ``cuda`` or ``cuda:<i>``.
        among: backends that ``auto`` may choose from; None: every backend.

    Raises:
        ValueError: no backend has this name.
        BackendUnavailableError: the named backend (for ``auto``: every backend) cannot use the device.
    """
    device_type = str(device).partition(":")[0]
    if name != "auto":
        require_device(name, get(name).check(), device_type)
        return name
    candidates = tuple(BACKENDS if among is None else among)
    passed_over: list[str] = []
    for candidate in candidates:
        availability = get(candidate).check()
        if device_type in availability.devices:
            logger.info(
                "Backend auto: %s %s, the first of %s that runs on %s%s",
                candidate,
                availability.version,
                ", ".join(candidates),
                device_type,
                "".join(f"; not {reason}" for reason in passed_over),
            )
            return candidate
        missing = [part for part in (availability.reason, availability.fix) if part]
        usable = f"it runs on {', '.join(availability.devices) or 'nothing'} here"
        passed_over.append(f"{candidate} ({'. '.join(missing) or usable})")
    raise BackendUnavailableError(f"no backend can use device {device_type!r} here: {'; '.join(passed_over)}.")
