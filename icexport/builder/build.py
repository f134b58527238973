"""``icexport build``: checkpoint to ONNX to engines to parity to bundle."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from icexport.backends.plans import PlanOptions
from icexport.builder.options import BuildSpec, plan
from icexport.bundle.engine_store import EngineStore
from icexport.bundle.store import Bundle, writing
from icexport.errors import BundleError, DamagedBundleError
from icexport.models.fit import check_fit
from icexport.models.loading import REFERENCE
from icexport.progress import Progress, silent

logger = logging.getLogger(__name__)


def build(
    cond: str,
    *,
    model: str = REFERENCE,
    controlnet: str | None = None,
    probe: str | None = None,
    backend: str | Sequence[str] = "auto",
    dtype: str = "fp32",
    height: int | str | None = None,
    width: int | str | None = None,
    batch_size: int | str | None = None,
    shapes: Sequence[str] = (),
    opset: int | None = None,
    target_sm: Sequence[int] = (),
    optimization_level: int = 3,
    workspace_mb: int | None = None,
    plugins: bool = True,
    engine_store: str | Path | None = None,
    output: str | Path | None = None,
    force: bool = False,
    verify: bool = True,
    progress: Progress = silent,
) -> Bundle:
    """Export, check and store one controlled model as a bundle.

    Args:
        cond: condition: ``canny``, ``hed``, ``lineart`` or ``depth``.
        model: base model: ``reference``, a diffusers folder or a Hub id.
        controlnet: folder or Hub id; default: ``controlnet-<cond>`` in the base model's folder.
        probe: folder or Hub id; default: ``probe-<cond>`` in the base model's folder; ``none`` for no probe.
        backend: one or more of ``auto``, ``onnxruntime``, ``torch``, ``tensorrt``, ``tensorrt-rtx``.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        height: pixels, or ``min:opt:max``; default: the model's own size.
        width: likewise.
        batch_size: pictures per call, or ``min:opt:max``; default: 1 with TensorRT, else ``1:1:4``.
        shapes: sizes such as ``512x768`` (height x width), instead of ``height`` and ``width``; TensorRT gets a static
            profile for each.
        opset: ONNX opset; default: 21, and 22 for ``bf16``.
        target_sm: compute capabilities, times ten (89), that TensorRT-RTX builds for; default: a portable plan.
        optimization_level: of TensorRT, 0 to 5.
        workspace_mb: most scratch memory of a TensorRT layer, in MiB; default: TensorRT's own limit.
        plugins: put the probe's Triton kernels into plans of classic TensorRT.
        engine_store: where built engines are kept for other bundles; default: see ``EngineStore``.
        output: the bundle's folder; default ``builds/<cond>``.
        force: build even if an identical bundle is there.
        verify: run the parity gate.
        progress: told what is being done.

    Returns:
        The bundle; if an identical one was there and is intact, that one, untouched.

    Raises:
        UsageError: an option that cannot be used.
        BackendUnavailableError: a named backend cannot build here.
        EngineError: TensorRT could not build a plan.
        CheckpointError: weights are missing, damaged or of another architecture.
        ParityError: an engine does not compute what the model computes; the first bad layer is named.
        BundleError: the folder is in use, or the disk refuses.
    """
    workspace = None if workspace_mb is None else workspace_mb << 20
    options = PlanOptions(tuple(sorted(set(target_sm))), optimization_level, workspace, plugins)
    spec = plan(
        cond, model, controlnet, probe, backend, dtype, height, width, batch_size, opset, verify, shapes, options
    )
    folder = Path(output or Path("builds") / cond)
    key = spec.key()
    if not force and (hit := _cached(folder, key)):
        logger.info("%s is up to date (key %s); nothing to do", folder, key[:12])
        return hit
    if spec.source.model == REFERENCE:
        logger.warning(
            "Using the embedded reference model: 64 x 64 px icons, made for trying things out. Name a real one with "
            "--model DIR|HUB_ID --controlnet DIR|HUB_ID --probe DIR."
        )
    progress("check the model")
    from icexport import conditions  # with torch; a cache hit does without
    from icexport.builder.writer import BundleWriter

    conditions.get(spec.source.condition)
    check_fit(spec.source)

    store = EngineStore(engine_store)
    with writing(folder) as temporary:
        _check_space(temporary, spec)
        BundleWriter(spec, key, temporary, store, progress).write()
    if spec.plan_backends:
        store.register(folder)
    return Bundle(folder)


def _cached(folder: Path, key: str) -> Bundle | None:
    """The intact bundle of this key in ``folder``, if there is one."""
    try:
        bundle = Bundle(folder)
        if bundle.manifest.key != key:
            return None
        bundle.verify()
    except DamagedBundleError as error:
        logger.warning("%s Building it again.", error)
        return None
    except BundleError:
        return None
    return bundle


def _check_space(folder: Path, spec: BuildSpec) -> None:
    """Refuse before the long work what would end in a full disk after it."""
    copies = 1 + ("torch" in spec.backends) + len(spec.plan_backends)
    needed = int(1.1 * spec.source.elements() * copies * (4 if spec.dtype == "fp32" else 2))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BundleError(
            f"{folder.parent} has {free / 1e9:.1f} GB free; this bundle needs about {needed / 1e9:.1f} GB. Nothing "
            "was changed. Free some space, or choose another --output."
        )
