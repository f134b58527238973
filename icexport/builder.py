"""``icexport build``: checkpoint to ONNX to engines to parity to bundle."""

from __future__ import annotations

import gc
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engines import registry
from icexport.build_spec import BuildSpec, check_fit, graphs, plan, versions
from icexport.bundle.manifest import EngineEntry, GraphEntry, Manifest, describe, engine_key
from icexport.bundle.store import Bundle, hash_files, sha256, writing
from icexport.errors import BundleError, DamagedBundleError
from icexport.export import DEFAULT_OPSET
from icexport.models.loading import REFERENCE, ModelSource

if TYPE_CHECKING:
    from icexport.export.profile import SizeRange
    from icexport.models.graphs import Graph

logger = logging.getLogger(__name__)

DEFAULT_BATCH = "1:1:4"


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
    batch_size: int | str = DEFAULT_BATCH,
    opset: int = DEFAULT_OPSET,
    output: str | Path | None = None,
    force: bool = False,
    verify: bool = True,
    progress: Callable[[str], None] = lambda _step: None,
) -> Bundle:
    """Export, check and store one controlled model as a bundle.

    Args:
        cond: condition: ``canny``, ``hed``, ``lineart`` or ``depth``.
        model: base model: ``reference``, a diffusers folder or a Hub id.
        controlnet: folder or Hub id; default: ``controlnet-<cond>`` in the base model's folder.
        probe: folder or Hub id; default: ``probe-<cond>`` in the base model's folder; ``none`` for no probe.
        backend: one or more of ``auto``, ``onnxruntime``, ``torch``.
        dtype: ``fp32`` or ``fp16``.
        height: pixels, or ``min:opt:max``; default: the model's own size.
        width: likewise.
        batch_size: pictures per call, or ``min:opt:max``.
        opset: ONNX opset.
        output: the bundle's folder; default ``builds/<cond>``.
        force: build even if an identical bundle is there.
        verify: run the parity gate.
        progress: called with a short text when a step begins.

    Returns:
        The bundle; if an identical one was there and is intact, that one, untouched.

    Raises:
        UsageError: an option that cannot be used.
        BackendUnavailableError: a named backend cannot run here.
        CheckpointError: weights are missing, damaged or of another architecture.
        ParityError: an engine does not compute what the model computes; the first bad layer is named.
        BundleError: the folder is in use, or the disk refuses.
    """
    spec = plan(cond, model, controlnet, probe, backend, dtype, height, width, batch_size, opset, verify)
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
    check_fit(spec.source)
    with writing(folder) as temporary:
        _check_space(temporary, spec)
        _write(spec, key, temporary, progress)
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
    copies = 1 + ("torch" in spec.backends)
    needed = int(1.1 * spec.source.elements() * copies * (4 if spec.dtype == "fp32" else 2))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BundleError(
            f"{folder.parent} has {free / 1e9:.1f} GB free; this bundle needs about {needed / 1e9:.1f} GB. Nothing "
            "was changed. Free some space, or choose another --output."
        )


def _write(spec: BuildSpec, key: str, folder: Path, progress: Callable[[str], None]) -> None:
    """Everything of a bundle, into an empty folder."""
    from icexport import conditions
    from icexport.fidelity import parity
    from icexport.models.sizes import size_multiple
    from icexport.verification import parity_gate, write_report

    source = spec.source
    symbols = spec.profile.symbols(size_multiple(source.config("unet"), source.config("vae")))
    (folder / "graphs").mkdir()
    entries: dict[str, GraphEntry] = {}
    engines: dict[str, EngineEntry] = {}
    for graph in graphs(spec, spec.dtype):
        progress(f"export {graph.name}")
        entries[graph.name] = _export(graph, folder, symbols, spec)
        for backend in spec.backends:
            engines |= _engine(graph, entries[graph.name], backend, folder, spec)
        del graph
        gc.collect()
    _copy_small_parts(source, folder)
    parts = ["text_encoder", "controlnet", "unet", "vae", *(["probe"] if source.probe_folder else [])]
    manifest = Manifest(
        key=key,
        condition=conditions.get(source.condition).describe(),
        source=source.describe(),
        dtype=spec.dtype,
        opset=spec.opset,
        profile=spec.profile,
        graphs=entries,
        configs={part: source.full_config(part) for part in parts},
        engines=engines,
        files=hash_files(folder),
        tolerances={"cosine": parity.MIN_COSINE, "factor": parity.FACTOR, "floor": parity.FLOOR[spec.dtype]},
        parity={},
        versions=versions(),
    )
    manifest.write(folder)
    if spec.verify:
        bundle = Bundle(folder)
        manifest.parity = parity_gate(bundle, spec, progress)
        write_report(bundle, manifest.parity)
        manifest.files = hash_files(folder)
        manifest.write(folder)


def _export(graph: Graph, folder: Path, symbols: dict[str, SizeRange], spec: BuildSpec) -> GraphEntry:
    from icexport.export.onnx import export_graph
    from icexport.export.precision import read_precision

    started = time.perf_counter()
    file = f"graphs/{graph.name}.onnx"
    export_graph(graph, folder / file, symbols, spec.opset)
    dtypes = read_precision(folder / file, spec.dtype)
    logger.debug("Exported %s in %.1f s", graph.name, time.perf_counter() - started)
    return GraphEntry(file, [describe(s) for s in graph.inputs], [describe(s) for s in graph.outputs], dtypes)


def _engine(graph: Graph, entry: GraphEntry, backend: str, folder: Path, spec: BuildSpec) -> dict[str, EngineEntry]:
    """The entry of one engine by its key, with its files written where the backend needs files of its own."""
    data = folder / f"{entry.file}.data"
    version = registry.check(backend).version or ""
    key = engine_key(
        graph_hash=sha256(folder / entry.file),
        weights_hash=sha256(data) if data.exists() else "",
        profile=spec.profile,
        dtype=spec.dtype,
        backend=backend,
        version=version,
        device="any",  # neither ONNX Runtime's nor PyTorch's files depend on the device
        kernels="",
    )
    files: list[str] = []
    if backend == "torch":
        from icexport.bundle.engines import save_torch

        save_torch(graph, folder / "engines" / key)
        files = sorted(p.relative_to(folder).as_posix() for p in (folder / "engines" / key).iterdir())
    return {key: EngineEntry(graph.name, backend, version, files)}


def _copy_small_parts(source: ModelSource, folder: Path) -> None:
    """Tokenizer, scheduler and feature extractor, as they are."""
    for part in ("tokenizer", "scheduler", "feature_extractor"):
        if (source.base / part).is_dir():
            shutil.copytree(source.base / part, folder / part, copy_function=shutil.copyfile)
    if (source.base / "safety_checker").is_dir():
        logger.warning(
            "The model has a safety checker, which is not exported: give one to InnerControlPipeline.from_pretrained("
            "..., safety_checker=...) where you need it."
        )
