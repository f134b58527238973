"""The table of backends: which there are, which are usable here, and which one ``auto`` means."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engines.base import Availability, require_device
from engines.errors import BackendUnavailableError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """One row of the table.

    Attributes:
        name: As the user writes it.
        summary: One line for ``doctor`` and ``--help``.
        check: ``module:function``, which returns its ``Availability``; imported when asked, for it imports torch.
    """

    name: str
    summary: str
    check: str


BACKENDS = {
    backend.name: backend
    for backend in (  # in the order in which "auto" tries them
        Backend("tensorrt", "TensorRT plans, NVIDIA GPUs", "engines.tensorrt.api:check_tensorrt"),
        Backend("tensorrt-rtx", "TensorRT-RTX plans, GeForce and RTX GPUs", "engines.tensorrt.api:check_tensorrt_rtx"),
        Backend("onnxruntime", "ONNX Runtime, CPU and CUDA", "engines.onnxruntime:check"),
        Backend("torch", "eager PyTorch, the reference", "engines.torch_eager:check"),
    )
}


def check(name: str) -> Availability:
    """Whether a backend can be used here; a backend that is missing or broken is an answer, not an error.

    Raises:
        ValueError: If no backend has this name; the message lists those that exist.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose from: auto, {', '.join(BACKENDS)}.")
    module_name, _, function = BACKENDS[name].check.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, OSError) as error:
        return Availability(False, None, f"{module_name} cannot be imported: {error}", "Install icexport again", ())
    availability: Availability = getattr(module, function)()
    return availability


def available() -> tuple[str, ...]:
    """Names of the usable backends, in the order in which ``auto`` tries them."""
    return tuple(name for name in BACKENDS if check(name).usable)


def resolve(name: str, device: str | torch.device = "cpu", among: Iterable[str] = tuple(BACKENDS)) -> str:
    """Turn a backend's name or ``"auto"`` into the name of a backend that can run on ``device``.

    ``auto`` takes the first usable one of ``among`` and logs which and why. A named backend is never replaced.

    Raises:
        ValueError: If no backend has this name.
        BackendUnavailableError: If the named backend (for ``auto``: every backend) cannot use the device.
    """
    device_type = str(device).partition(":")[0]
    if name != "auto":
        require_device(name, check(name), device_type)
        return name
    candidates = tuple(among)
    passed_over: list[str] = []
    for candidate in candidates:
        availability = check(candidate)
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
        passed_over.append(f"{candidate} ({availability.reason}. {availability.fix})")
    raise BackendUnavailableError(f"no backend can use device {device_type!r} here: {'; '.join(passed_over)}.")
