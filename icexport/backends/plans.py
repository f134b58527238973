"""TensorRT plans of a bundle: what is asked of the builder, and where the result is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icexport.bundle.engine_store import EngineStore
from icexport.bundle.manifest import EngineEntry, key_parts
from icexport.graphs.profile import Profile, SizeRange
from icexport.host.files import digest, sha256
from icexport.progress import Progress

if TYPE_CHECKING:
    from engines.base import TensorSpec
    from engines.tensorrt.build import Shapes

PLAN_BACKENDS = ("tensorrt", "tensorrt-rtx")
PLAN_NAME = "engine.plan"
REPORT_NAME = "engine.json"


@dataclass(frozen=True)
class PlanOptions:
    """What the user may say about TensorRT plans.

    Attributes:
        targets: compute capabilities, times ten, that TensorRT-RTX builds for; none: every one that it knows.
        optimization_level: 0 to 5: how long the builder looks for faster kernels.
        workspace_bytes: most scratch memory that a layer may use; None: the builder's own limit.
        plugins: put the probe's Triton kernels into classic TensorRT's plans.
    """

    targets: tuple[int, ...] = ()
    optimization_level: int = 3
    workspace_bytes: int | None = None
    plugins: bool = True

    def to_json(self) -> dict[str, Any]:
        """Everything that changes a plan and is not in its key already."""
        return {"optimization_level": self.optimization_level, "workspace_bytes": self.workspace_bytes}


def build_plan(
    graph: str,
    onnx: Path,
    inputs: Sequence[TensorSpec],
    *,
    backend: str,
    dtype: str,
    profile: Profile,
    multiple: int,
    options: PlanOptions,
    plugins: Sequence[str],
    store: EngineStore,
    folder: Path,
    progress: Progress,
) -> dict[str, EngineEntry]:
    """Bring one graph's plan into the bundle that is being written, from the store or by building it.

    Args:
        graph: name of the graph.
        onnx: its file; with ``plugins``, the one that has them as nodes.
        inputs: of the graph.
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        dtype: of the graph.
        profile: sizes of the bundle.
        multiple: pixels of one step of the symbols ``h`` and ``w``.
        options: the user's.
        plugins: names of the plugins in the graph.
        store: where engines are kept.
        folder: of the bundle that is being written.
        progress: told how far the builder is.

    Returns:
        The manifest's entry by its key.

    Raises:
        EngineError: the builder failed; its own words are in the message.
        BackendUnavailableError: the library is missing, or a target is unknown to it.
        BundleError: the store cannot be written.
    """
    from engines.tensorrt import api
    from engines.tensorrt.build import PlanRequest

    step = f"{backend} plan of {graph}"
    progress(step)
    version = str(api.load(backend).__version__)
    cross_builds = api.FLAVOURS[backend].cross_builds
    targets = options.targets if cross_builds else ()
    device = api.device_tag(backend, targets, None)
    data = onnx.with_name(f"{onnx.name}.data")
    parts = key_parts(
        graph_hash=sha256(onnx),
        weights_hash=sha256(data) if data.exists() else "",
        profile=profile,
        dtype=dtype,
        backend=backend,
        version=version,
        device=device,
        kernels=_kernel_hash() if plugins else "",
        options=options.to_json(),
    )
    key = digest(parts)

    def make(target: Path) -> None:
        from engines.tensorrt.worker import build

        request = PlanRequest(
            flavour=backend,
            onnx=onnx,
            plan=target / PLAN_NAME,
            dtype=dtype,
            profiles=tuple(optimisation_profiles(graph, inputs, profile, multiple)),
            targets=targets,
            optimization_level=options.optimization_level,
            workspace_bytes=options.workspace_bytes,
            timing_cache=None if cross_builds else _timing_cache(store, version, device),
            plugins=tuple(plugins),
        )
        report = build(request, progress=lambda _phase, share: progress(step, share))
        text = json.dumps({"graph": graph, "made_from": parts, **report.as_json()}, indent=2)
        (target / REPORT_NAME).write_text(text + "\n", encoding="utf-8")

    store.fetch(key, folder / "engines" / key, make)
    files = [f"engines/{key}/{name}" for name in (PLAN_NAME, REPORT_NAME)]
    report = json.loads((folder / files[1]).read_text(encoding="utf-8"))
    return {key: EngineEntry(graph, backend, version, files, device, report)}


def optimisation_profiles(
    graph: str, inputs: Sequence[TensorSpec], profile: Profile, multiple: int
) -> Iterator[dict[str, Shapes]]:
    """TensorRT's optimisation profiles: smallest, usual and largest shape of every input with a free axis.

    A fixed number of pictures becomes two static profiles of the UNet and the ControlNet, without and with guidance,
    and every listed size one of its own: static shapes are what kernels are tuned best for.
    """
    from icexport.graphs.graph import size_of

    symbols = profile.symbols(multiple)
    free = {name for name, size in symbols.items() if not size.fixed}
    found: list[dict[str, Shapes]] = []
    for batch, (h, w) in product(_batches(graph, profile), _sizes(profile, multiple)):
        ranges = {**symbols, "batch": batch, "h": h, "w": w}
        shapes: dict[str, Shapes] = {}
        for spec in inputs:
            if free & {str(d).rpartition("*")[2] for d in spec.shape if isinstance(d, str)}:
                low, usual, high = (
                    tuple(size_of(d, {n: getattr(r, point) for n, r in ranges.items()}) for d in spec.shape)
                    for point in ("min", "opt", "max")
                )
                shapes[spec.name] = (low, usual, high)
        if shapes and shapes not in found:
            found.append(shapes)
    return iter(found)


def _batches(graph: str, profile: Profile) -> list[SizeRange]:
    """Ranges of the batch axis of a graph: guidance doubles it for the two that run on both halves."""
    size = profile.batch
    guided = graph in ("controlnet", "unet")
    if size.fixed:
        return [SizeRange(n, n, n) for n in ((size.opt, 2 * size.opt) if guided else (size.opt,))]
    return [SizeRange(size.min, 2 * size.opt, 2 * size.max) if guided else size]


def _sizes(profile: Profile, multiple: int) -> list[tuple[SizeRange, SizeRange]]:
    if not profile.shapes:
        symbols = profile.symbols(multiple)
        return [(symbols["h"], symbols["w"])]
    return [
        (SizeRange(*[height // multiple] * 3), SizeRange(*[width // multiple] * 3)) for height, width in profile.shapes
    ]


def _timing_cache(store: EngineStore, version: str, device: str) -> Path:
    """Where classic TensorRT keeps what it timed on this kind of GPU."""
    store.timing.mkdir(parents=True, exist_ok=True)
    return store.timing / f"{version}-{device.replace(' ', '_')}.cache"


def _kernel_hash() -> str:
    from engines.kernels.plugins import kernel_hash

    return kernel_hash()
