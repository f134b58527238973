"""Whether an engine's library is there, found out without torch where possible: an up-to-date bundle needs no more."""

from __future__ import annotations

from dataclasses import replace

from engines.base import Availability

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""ONNX Runtime's name for what runs on each type of device."""


def onnxruntime() -> Availability:
    """Tell whether ONNX Runtime imports, and on which devices it can share memory with torch. Never raises."""
    try:
        import onnxruntime

        version, providers = str(onnxruntime.__version__), onnxruntime.get_available_providers()
    except (ImportError, OSError, AttributeError) as error:  # AttributeError: a half-removed installation
        fix = "Run: pip install --force-reinstall onnxruntime"
        return Availability(False, None, f"onnxruntime cannot be imported: {error}", fix, ())
    if PROVIDERS["cuda"] in providers:
        from engines import torch_eager

        return replace(torch_eager.check(), version=version)  # torch holds the memory: its devices are the limit
    return Availability(
        True,
        version,
        f"onnxruntime {version} was built without {PROVIDERS['cuda']}",
        "For a GPU, run: pip uninstall onnxruntime, then: pip install onnxruntime-gpu",
        ("cpu",),
    )
