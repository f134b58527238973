"""``icexport verify`` and the last step of ``build``: the parity gate over a bundle's engines."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from icexport.backends.engines import built_backends, choose_backend, default_device
from icexport.bundle.records import parity_json
from icexport.bundle.source import recorded_source
from icexport.bundle.store import Bundle
from icexport.gates.parity_gate import expected_of, parity_gate
from icexport.models.precision import precision
from icexport.progress import Progress, expect, silent

logger = logging.getLogger(__name__)


def verify(
    bundle: Bundle | str,
    *,
    backend: str | Sequence[str] | None = None,
    device: str | None = None,
    model: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Check every file's hash, then every engine against the model that the bundle was made from.

    Args:
        bundle: a bundle or its folder.
        backend: one or more names of backends; default: all that the bundle was built for.
        device: where the engines run, ``cpu``, ``cuda`` or ``cuda:<i>``; default: ``cuda`` for a backend that runs
            nowhere else, else ``cpu``. What they are compared with is always computed on the CPU.
        model: where the base model lies now, if it has moved.
        progress: told what is being done; see ``icexport.progress.Progress``.

    Returns:
        Results by backend, graph and output, as in ``reports/parity.json``.

    Raises:
        DamagedBundleError: a file was changed.
        CheckpointError: the model is not the one that the bundle was made from.
        ParityError: an engine does not match; the results are its ``results``.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    expect(progress, 1 + 2 * len(bundle.manifest.graphs))
    progress("check the files")
    bundle.verify()
    source = recorded_source(bundle, model)
    names = (backend,) if isinstance(backend, str) else tuple(backend or built_backends(bundle))
    chosen = [choose_backend(bundle, name, device or default_device(bundle, name)) for name in names]
    backends = tuple(dict.fromkeys(chosen))
    manifest = bundle.manifest
    expected = expected_of(source, precision(manifest.dtype), manifest.profile, progress)
    return parity_json(parity_gate(bundle, source, expected, backends, progress, device))
