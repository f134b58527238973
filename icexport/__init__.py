"""icexport: from an InnerControl checkpoint to fast engines that are checked to obey the control."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from icexport.host.versions import __version__

if TYPE_CHECKING:
    from icexport import conditions
    from icexport.builder.build import build
    from icexport.bundle.store import Bundle
    from icexport.fidelity.report import FidelityReport
    from icexport.gates.verify import verify
    from icexport.models.probe import InnerControlProbe
    from icexport.reference import reference_path
    from icexport.runtime.pipeline import InnerControlPipeline

__all__ = [
    "Bundle",
    "FidelityReport",
    "InnerControlPipeline",
    "InnerControlProbe",
    "__version__",
    "build",
    "conditions",
    "reference_path",
    "verify",
]

_WHERE = {
    "Bundle": "icexport.bundle.store",
    "FidelityReport": "icexport.fidelity.report",
    "InnerControlPipeline": "icexport.runtime.pipeline",
    "InnerControlProbe": "icexport.models.probe",
    "build": "icexport.builder.build",
    "reference_path": "icexport.reference",
    "verify": "icexport.gates.verify",
}


def __getattr__(name: str) -> Any:
    """Import on first use: ``icexport --help`` must not pay for torch."""
    if name == "conditions":
        return importlib.import_module("icexport.conditions")
    if name not in _WHERE:
        raise AttributeError(f"module 'icexport' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
