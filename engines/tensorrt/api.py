"""The two TensorRT libraries: which is installed, what it can do here, and what a plan is tied to.

From version 10.9 on the classic library, and every version of TensorRT-RTX, take the types of all tensors from the
network ("strongly typed"), so one adapter serves both. What differs is asked of the module with ``hasattr``.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from engines.base import Availability
from engines.errors import BackendUnavailableError

if TYPE_CHECKING:  # the process that builds a plan must not pay for torch
    import torch

RTX_TARGETS = (75, 80, 86, 89, 120, 121)
"""Compute capabilities, times ten, for which TensorRT-RTX builds: GeForce and RTX cards, and the A100."""

_CLASSIC_MINIMUM = 75


@dataclass(frozen=True)
class Flavour:
    """One of the two libraries.

    Attributes:
        name: name of the backend, as the user writes it.
        module: name of the Python module.
        minimum: oldest version with everything that is used here.
        install: name of the package to install.
    """

    name: str
    module: str
    minimum: str
    install: str

    @property
    def cross_builds(self) -> bool:
        """Whether it can build without a GPU, for GPUs that are named by their compute capability."""
        return self.name == "tensorrt-rtx"

    def supports(self, capability: int) -> bool:
        """Tell whether it can run on a GPU of this compute capability (times ten: 89 is 8.9)."""
        return capability in RTX_TARGETS if self.cross_builds else capability >= _CLASSIC_MINIMUM


FLAVOURS = {
    flavour.name: flavour
    for flavour in (
        Flavour("tensorrt", "tensorrt", "10.9", "tensorrt"),
        Flavour("tensorrt-rtx", "tensorrt_rtx", "1.7", "tensorrt-rtx-cu13"),
    )
}


def load(flavour: str) -> Any:
    """Import the library of a flavour.

    Args:
        flavour: key of ``FLAVOURS``.

    Returns:
        The module. Any: neither library ships type information.

    Raises:
        BackendUnavailableError: if the library, or a shared object of it, is missing, or it is too old; says what to
            install.
    """
    module, _, reason, fix = _find(FLAVOURS[flavour])
    if module is None:
        raise BackendUnavailableError(f"backend {flavour!r} is not available: {reason}. {fix}.")
    return module


def check(flavour: str) -> Availability:
    """Tell whether a library can build and run here. Never raises.

    Classic TensorRT needs a GPU for both; TensorRT-RTX builds wherever it imports.

    Args:
        flavour: key of ``FLAVOURS``.
    """
    return _check(FLAVOURS[flavour])


def device_tag(flavour: str, targets: Sequence[int], device: str | torch.device | None) -> str:
    """Return what a plan is tied to; part of its key.

    Args:
        flavour: key of ``FLAVOURS``.
        targets: compute capabilities, times ten, that TensorRT-RTX builds for; none means all that it knows.
        device: where classic TensorRT builds; None means torch's current CUDA device. TensorRT-RTX does not use it.

    Returns:
        TensorRT-RTX: ``"sm_86+sm_89"`` or ``"portable"``. TensorRT: ``"NVIDIA H200 sm_90"``.

    Raises:
        BackendUnavailableError: if classic TensorRT finds no GPU at ``device``.
    """
    if FLAVOURS[flavour].cross_builds:
        return "+".join(f"sm_{target}" for target in sorted(set(targets))) or "portable"
    import torch

    problem = _missing_gpu()
    if problem is None and device is not None:
        wanted = torch.device(device)
        if wanted.type != "cuda" or (wanted.index or 0) >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            problem = f"{wanted} is not one of the {count} CUDA devices", "Choose another device"
    if problem is not None:
        raise BackendUnavailableError(
            f"a plan of backend {flavour!r} is made for the GPU it is built on: {problem[0]}. {problem[1]}, or name "
            "the target's compute capability and use backend 'tensorrt-rtx'."
        )
    return f"{torch.cuda.get_device_name(device)} sm_{_capability(device)}"


def logger(module: Any, sink: Callable[[str, str], None]) -> Any:
    """Make a logger for a TensorRT library.

    Args:
        module: the library.
        sink: called, from any thread, with the severity (``"WARNING"``, ``"ERROR"`` ...) and the text.

    Returns:
        A ``module.ILogger``. Keep a reference to it as long as anything that was made with it.
    """

    class Logger(module.ILogger):  # type: ignore[misc]  # the base class is known at run time only
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            sink(severity.name, text)

    return Logger()


def driver_problem() -> str | None:
    """Return why there is no NVIDIA driver; None if there is one."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        return f"there is no NVIDIA driver ({error})"
    return None


def _find(flavour: Flavour) -> tuple[Any | None, str | None, str, str]:
    """Return the module and version; if the module is None, the reason and the fix."""
    install = f"Run: pip install '{flavour.install}>={flavour.minimum}'"
    try:
        module = importlib.import_module(flavour.module)
        version = str(module.__version__)
    except ModuleNotFoundError as error:
        if error.name == flavour.module:
            return None, None, f"{flavour.module} is not installed", install
        return None, None, f"{flavour.module} cannot be imported: {error}", install
    except (ImportError, OSError, AttributeError) as error:  # AttributeError: a half-removed installation
        reinstall = f"Run: pip install --force-reinstall '{flavour.install}>={flavour.minimum}'"
        return None, None, f"{flavour.module} cannot be imported: {error}", reinstall
    if Version(version) < Version(flavour.minimum):
        return None, version, f"{flavour.module} {version} is too old, {flavour.minimum} is needed", install
    return module, version, "", ""


def _check(flavour: Flavour) -> Availability:
    module, version, reason, fix = _find(flavour)
    if module is None:
        return Availability(False, version, reason, fix, ())
    problem = _missing_gpu() or _refused_gpus(flavour)
    if problem is not None:
        return Availability(False, version, *problem, (), flavour.cross_builds)
    return Availability(True, version, "", "", ("cuda",), flavour.cross_builds)


def _missing_gpu() -> tuple[str, str] | None:
    """Return the reason and fix if torch has no GPU to share memory with."""
    import torch

    if torch.cuda.is_available():
        return None
    missing = driver_problem()
    if missing is not None:
        return missing, "On a machine with an NVIDIA GPU, install its driver"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA", "Install a CUDA build of torch"
    return (
        f"torch {torch.__version__} sees no CUDA device",
        "Check the driver and CUDA_VISIBLE_DEVICES with nvidia-smi",
    )


def _refused_gpus(flavour: Flavour) -> tuple[str, str] | None:
    """Return the reason and fix if the flavour takes none of the GPUs that torch sees."""
    import torch

    found = [_capability(index) for index in range(torch.cuda.device_count())]
    if any(flavour.supports(capability) for capability in found):
        return None
    gpus = ", ".join(f"{torch.cuda.get_device_name(index)} (sm_{sm})" for index, sm in enumerate(found))
    if not flavour.cross_builds:
        return f"TensorRT needs sm_{_CLASSIC_MINIMUM} or later, this machine has {gpus}", "Use backend 'onnxruntime'"
    supported = ", ".join(f"sm_{target}" for target in RTX_TARGETS)
    return f"TensorRT-RTX runs on {supported} only, this machine has {gpus}", "Use backend 'tensorrt'"


def _capability(device: str | int | torch.device | None) -> int:
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
