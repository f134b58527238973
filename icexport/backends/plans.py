"""TensorRT plans of a bundle: what is asked of the builder, and where the result is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from icexport.backends.base import EngineRequest, Made
from icexport.bundle.records import EngineEntry
from icexport.graphs.profile import Profile, SizeRange
from icexport.graphs.shapes import TensorInfo, size_of

if TYPE_CHECKING:
    from engines.tensorrt.build import Shapes

PLAN_NAME = "engine.plan"
REPORT_NAME = "engine.json"


def build_plan(backend: str, request: EngineRequest, made: Made, targets: Sequence[int]) -> EngineEntry:
    """Bring one graph's plan into the bundle that is being written, from the store or by building it.

    Args:
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        request: what is built, and where it goes.
        made: the engine's key, and the ONNX file to use.
        targets: compute capabilities, times ten, to build for; none: this machine's GPU, or a portable plan.

    Raises:
        EngineError: the builder failed; its own words are in the message.
        BackendUnavailableError: the library is missing, or a target is unknown to it.
        BundleError: the store cannot be written.
    """
    step = f"{backend} plan of {request.graph}"
    request.progress(step)
    version, device = made.parts["version"], made.parts["device"]

    def make(target: Path) -> None:
        from engines.tensorrt import api
        from engines.tensorrt.build import PlanRequest
        from engines.tensorrt.worker import build

        options = request.options
        plan = PlanRequest(
            flavour=backend,
            onnx=made.onnx,
            plan=target / PLAN_NAME,
            dtype=request.dtype,
            profiles=tuple(optimisation_profiles(request.entry.inputs, request.profile, request.multiple)),
            targets=tuple(targets),
            optimization_level=options.optimization_level,
            workspace_bytes=options.workspace_bytes,
            timing_cache=None if api.FLAVOURS[backend].cross_builds else request.store.timing(f"{version}-{device}"),
            plugins=made.plugins,
        )
        report = build(plan, progress=lambda _phase, share: request.progress(step, share))
        text = json.dumps({"graph": request.graph, "made_from": made.parts, **report.as_json()}, indent=2)
        (target / REPORT_NAME).write_text(text + "\n", encoding="utf-8")

    request.store.fetch(made.key, request.folder / "engines" / made.key, make, request.hashes)
    files = [f"engines/{made.key}/{name}" for name in (PLAN_NAME, REPORT_NAME)]
    report = json.loads((request.folder / files[1]).read_text(encoding="utf-8"))
    return EngineEntry(request.graph, backend, version, files, device, made.parts, report)


def optimisation_profiles(
    inputs: Sequence[TensorInfo], profile: Profile, multiple: int
) -> Iterator[dict[str, Shapes]]:
    """Return TensorRT's optimisation profiles: smallest, usual and largest shape of every input with a free axis.

    A fixed number of pictures becomes two static profiles of the UNet and the ControlNet, without and with guidance,
    and every listed size one of its own: static shapes are what kernels are tuned best for.

    Args:
        inputs: inputs of the graph.
        profile: sizes of the bundle.
        multiple: pixels of one step of the symbols ``rows`` and ``columns``.
    """
    symbols = profile.symbols(multiple)
    free = {name for name, size in symbols.items() if not size.fixed}
    seen: list[dict[str, Shapes]] = []
    for samples, (rows, columns) in product(_samples(profile), _sizes(profile, multiple)):
        ranges = {**symbols, "samples": samples, "rows": rows, "columns": columns}
        shapes: dict[str, Shapes] = {}
        for info in inputs:
            if free & info.symbols:
                low, usual, high = (
                    tuple(size_of(d, {n: getattr(r, point) for n, r in ranges.items()}) for d in info.shape)
                    for point in ("min", "opt", "max")
                )
                shapes[info.name] = (low, usual, high)
        if shapes and shapes not in seen:
            seen.append(shapes)
    return iter(seen)


def _samples(profile: Profile) -> list[SizeRange]:
    """Return the ranges of the samples of one UNet call: guidance doubles a fixed number of pictures, or does not."""
    size = profile.batch
    if size.fixed:
        return [SizeRange(n, n, n) for n in (size.opt, 2 * size.opt)]
    return [SizeRange(size.min, 2 * size.opt, 2 * size.max)]


def _sizes(profile: Profile, multiple: int) -> list[tuple[SizeRange, SizeRange]]:
    if not profile.shapes:
        symbols = profile.symbols(multiple)
        return [(symbols["rows"], symbols["columns"])]
    return [
        (SizeRange(*[height // multiple] * 3), SizeRange(*[width // multiple] * 3)) for height, width in profile.shapes
    ]
