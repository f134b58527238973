"""icexport: from an InnerControl checkpoint to fast engines that are checked to obey the control."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from icexport import conditions
    from icexport.builder import build
    from icexport.bundle.store import Bundle
    from icexport.models.probe import InnerControlProbe
    from icexport.reference import reference_path
    from icexport.runtime.outputs import FidelityReport
    from icexport.runtime.pipeline import InnerControlPipeline
    from icexport.verification import verify

__all__ = [
    "Bundle",
    "FidelityReport",
    "InnerControlPipeline",
    "InnerControlProbe",
    "build",
    "conditions",
    "reference_path",
    "verify",
]

_WHERE = {
    "Bundle": "icexport.bundle.store",
    "FidelityReport": "icexport.runtime.outputs",
    "InnerControlPipeline": "icexport.runtime.pipeline",
    "InnerControlProbe": "icexport.models.probe",
    "build": "icexport.builder",
    "reference_path": "icexport.reference",
    "verify": "icexport.verification",
}


def __getattr__(name: str) -> Any:
    """Import on first use: ``icexport --help`` must not pay for torch."""
    if name == "conditions":
        return importlib.import_module("icexport.conditions")
    if name not in _WHERE:
        raise AttributeError(f"module 'icexport' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
