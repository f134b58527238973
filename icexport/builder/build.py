"""``icexport build``: checkpoint to ONNX to engines to parity to bundle."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from icexport.backends import table
from icexport.backends.base import PlanOptions
from icexport.builder.options import BuildOptions, BuildSpec
from icexport.bundle.engine_store import EngineStore
from icexport.bundle.store import Bundle, writing
from icexport.errors import BundleError, DamagedBundleError, SchemaError
from icexport.models.base_model import REFERENCE
from icexport.models.precision import precision
from icexport.models.source import ModelSource
from icexport.progress import Progress, expect, silent

logger = logging.getLogger(__name__)


def build(
    cond: str,
    *,
    model: str = REFERENCE,
    controlnet: str | None = None,
    probe: str | None = None,
    vae: str | None = None,
    variant: str | None = None,
    model_config: str | None = None,
    backend: str | Sequence[str] = "auto",
    dtype: str = "fp32",
    height: int | str | None = None,
    width: int | str | None = None,
    batch_size: int | str | None = None,
    shapes: Sequence[str] = (),
    text_length: int | str | None = None,
    opset: int | None = None,
    target_sm: Sequence[int] = (),
    optimization_level: int = 3,
    workspace_mb: int | None = None,
    plugins: bool = True,
    engine_store: str | Path | None = None,
    output: str | Path | None = None,
    force: bool = False,
    check_hashes: bool = False,
    verify: bool = True,
    preflight: bool = True,
    progress: Progress = silent,
) -> Bundle:
    """Export, check and store one controlled model as a bundle.

    Args:
        cond: condition: ``canny``, ``hed``, ``lineart`` or ``depth``.
        model: base model: ``reference``, a diffusers folder, a single file (.safetensors, .ckpt, .pth) or a Hub id.
        controlnet: folder, single file or Hub id; default: ``controlnet-<cond>`` in the base model's folder.
        probe: folder or Hub id; default: ``probe-<cond>`` in the base model's folder; ``none`` for no probe.
        vae: autoencoder in place of the model's own: folder, single file or Hub id.
        variant: variant of the weights, such as ``fp16``, for the parts that have it; default: the plain weights, or
            the only variant that there is.
        model_config: folder or Hub id with the configs and the tokenizer of a single-file model; default: those of
            Stable Diffusion 1.
        backend: one or more of ``auto``, ``onnxruntime``, ``torch``, ``tensorrt``, ``tensorrt-rtx``.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        height: height in pixels, or ``min:opt:max``; default: the model's own size.
        width: width in pixels, likewise.
        batch_size: number of pictures per call, or ``min:opt:max``; default: 1 with TensorRT, else ``1:1:4``.
        shapes: sizes such as ``512x768`` (height x width), instead of ``height`` and ``width``; TensorRT gets a static
            profile for each.
        text_length: number of tokens of ``prompt_embeds``, as ``min:opt:max``; default: what the model's text encoder
            makes (77). Longer prompts come from other tools, as embeddings.
        opset: ONNX opset; default: 21, and 22 for ``bf16``.
        target_sm: compute capabilities, times ten (89), that TensorRT-RTX builds for; default: a portable plan.
        optimization_level: optimisation level of TensorRT, 0 to 5.
        workspace_mb: most scratch memory of a TensorRT layer, in MiB; default: TensorRT's own limit.
        plugins: put the probe's Triton kernels into plans of classic TensorRT.
        engine_store: where built engines are kept for other bundles; default: see ``EngineStore``.
        output: the bundle's folder; default ``builds/<cond>``.
        force: build even if an identical bundle is there.
        check_hashes: before saying that an identical bundle is there, read every file of it and of the model; by
            default, those whose size and time are as recorded are taken to be unchanged.
        verify: run the parity gate.
        preflight: refuse at once what will not fit into the free memory or on the disk.
        progress: told what is being done; see ``icexport.progress.Progress``.

    Returns:
        The bundle; if an identical one was there and is intact, that one, untouched.

    Raises:
        UsageError: an option cannot be used.
        BackendUnavailableError: a named backend cannot build here.
        EngineError: TensorRT could not build a plan.
        OutOfMemoryError: there is less memory than the build will take.
        CheckpointError: weights are missing, damaged or of another architecture.
        ParityError: an engine does not compute what the model computes; the first bad layer is named.
        BundleError: the folder is in use, or the disk has too little room or refuses.
    """
    workspace = None if workspace_mb is None else workspace_mb << 20
    plans = PlanOptions(tuple(sorted(set(target_sm))), optimization_level, workspace, plugins)
    options = BuildOptions(
        model=model,
        controlnet=controlnet,
        probe=probe,
        vae=vae,
        variant=variant,
        model_config=model_config,
        backends=[backend] if isinstance(backend, str) else backend,
        dtype=dtype,
        height=height,
        width=width,
        batch_size=batch_size,
        shapes=shapes,
        text_length=text_length,
        opset=opset,
        verify=verify,
        plans=plans,
    )
    spec = BuildSpec.of(cond, options)
    folder = Path(output or Path("builds") / cond)
    earlier = None if force else _earlier(folder)
    if earlier is not None and not check_hashes:
        _know_unchanged(earlier, spec.source)
    expect(progress, _steps(spec))
    if earlier is None:
        progress("check the model")  # hashing it takes a while; a cache hit, which hashes it, too, begins no step
    key = spec.key()
    if earlier is not None and _is_intact(earlier, key):
        logger.info("%s is up to date (key %s); nothing to do", folder, key[:12])
        return earlier
    if spec.source.names.model == REFERENCE:
        logger.warning(
            "Using the embedded reference model: 64 x 64 px icons, made for trying things out. Name a real one with "
            "--model DIR|HUB_ID --controlnet DIR|HUB_ID --probe DIR."
        )
    progress("check the model")
    from icexport import conditions  # with torch, as the next two; a cache hit does without
    from icexport.builder.preflight import check_room
    from icexport.builder.writer import write_bundle
    from icexport.models.fit import check_source

    conditions.get(spec.source.condition)
    check_source(spec.source)
    store = EngineStore(engine_store)
    with writing(folder) as temporary:
        if preflight:
            check_room(temporary, spec)
        write_bundle(spec, key, temporary, store, progress)
    if any(table.get(name).stores for name in spec.backends):
        store.register(folder)
    return Bundle(folder)


def _steps(spec: BuildSpec) -> int:
    """Count the steps that a build tells of, apart from what its backends do beyond plans."""
    graphs = len(spec.source.family.graph_names) - (spec.source.probe is None)
    ranges = precision(spec.dtype).overflows
    plans = sum(table.get(name).stores for name in spec.backends)
    # Model, picture and hashes come once; export, reference, float16 range, plans and parity for each graph.
    return 2 + ranges + graphs * (1 + (ranges or spec.verify) + ranges + plans + spec.verify)


def _earlier(folder: Path) -> Bundle | None:
    """Return the bundle that is in ``folder``, if there is one that can be read."""
    try:
        return Bundle(folder)
    except DamagedBundleError as error:
        logger.warning("%s Building it again.", error)
    except SchemaError as error:
        logger.info("%s", error)
    except BundleError:
        logger.debug("There is no bundle in %s yet", folder)
    return None


def _know_unchanged(bundle: Bundle, source: ModelSource) -> None:
    """Take over the recorded hashes of those files of the bundle and the model that have their recorded stamps."""
    manifest = bundle.manifest
    for name, stamp in manifest.stamps.files.items():
        if name in manifest.files:
            bundle.hashes.know(bundle.path / name, stamp, manifest.files[name])
    for name, stamp in manifest.stamps.source.items():
        if name in source.paths and name in manifest.source.files:
            source.hashes.know(source.paths[name], stamp, manifest.source.files[name])


def _is_intact(bundle: Bundle, key: str) -> bool:
    """Tell whether it is the bundle of this key, with all of its files as they were."""
    if bundle.manifest.key != key:
        return False
    try:
        bundle.verify()
    except DamagedBundleError as error:
        logger.warning("%s Building it again.", error)
        return False
    return True
