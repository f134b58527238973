"""``icexport verify`` and ``icexport doctor``: is the bundle right, and is this machine?"""

from __future__ import annotations

import os
import platform
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from icexport.backends import table
from icexport.bundle.records import parity_from_json
from icexport.cli.console import Steps, emit, say, show
from icexport.cli.options import Backends, BundlePath, Device, Json
from icexport.cli.summary import parity_rows
from icexport.errors import IcexportError, ParityError
from icexport.host.versions import __version__, version_of

_NEEDED = ("cv2", "diffusers", "huggingface_hub", "numpy", "onnx", "onnxruntime", "onnxscript", "PIL", "torch")
_PACKAGES = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "huggingface_hub",
    "safetensors",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "triton",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "opencv-python-headless",
    "numpy",
    "pillow",
    "accelerate",
    "h5py",
)


def verify(
    bundle: BundlePath,
    backend: Backends = None,
    device: Device = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="DIR|HUB_ID", help="Base model, if it has moved since the build.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a bundle again.

    Every file against its hash, and every engine against the PyTorch model that the bundle was made from.
    """
    from icexport.gates.verify import verify as run

    failure = None
    with Steps() as steps:
        try:
            results = run(str(bundle), backend=backend, device=device, model=model, progress=steps)
        except ParityError as error:
            failure, results = error, error.results
    if as_json:
        emit({"bundle": str(bundle), "passed": failure is None, "parity": results})
    else:
        show({"bundle": str(bundle), "passed": failure is None, "parity": parity_rows(parity_from_json(results))})
    if failure is not None:
        raise failure


def doctor(as_json: Json = False) -> None:
    """Tell what this machine can run.

    What is installed, which devices and backends can be used, and how to fix what cannot.
    """
    from icexport.reference import reference_path

    backends = _backends()
    packages = {name: version_of(name) for name in _PACKAGES}
    problems = _problems(backends)
    document = {
        "icexport": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": f"{platform.processor() or platform.machine()}, {os.cpu_count()} threads",
        "gpus": _gpus(),
        "reference_model": (reference_path() / "model_index.json").is_file(),
        "disk_free_GB": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
        "packages": packages,
        "backends": backends,
        "problems": problems,
    }
    if as_json:
        emit(document)
    else:
        show({**document, "packages": {name: found for name, found in packages.items() if found}})
    if problems:
        say(f"Error: icexport cannot run here. {' '.join(problems)}")
        raise typer.Exit(1)


def _backends() -> list[dict[str, Any]]:
    rows = []
    for name, backend in table.BACKENDS.items():
        found = backend.check()
        row = {"backend": name, "usable": found.usable, "builds": found.builds, "version": found.version}
        row["devices"] = list(found.devices)
        rows.append({**row, "missing": found.reason, "fix": found.fix})
    return rows


def _gpus() -> list[str]:
    """Return the names of the CUDA devices that torch sees."""
    try:
        import torch
    except (ImportError, OSError):  # told by _problems
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _problems(backends: list[dict[str, Any]]) -> list[str]:
    """Return everything for which icexport cannot run at all, each with its fix."""
    from icexport.host.preflight import check_torchvision

    problems = []
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        problems.append(f"Not installed: {', '.join(missing)}. Run: pip install icexport")
    try:
        check_torchvision()
    except IcexportError as error:
        problems.append(str(error))
    if not any(row["usable"] for row in backends):
        problems.append("No backend is usable; see above for the fix of each.")
    return problems
