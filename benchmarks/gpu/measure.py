"""Times of every kernel and of the whole head, beside eager torch, torch.compile and the official formulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu import head
from benchmarks.gpu.official import OfficialHead
from benchmarks.gpu.timing import Bench, Ceilings, Row, Spread
from engines.kernels import SPECS, KernelSpec
from engines.kernels.spec import Case
from icexport.models.fused_probe import FusedProbe

Call = Callable[[], Tensor]

# Taps of Stable Diffusion 1.5 with this many channels are so many times smaller than the latent.
_SCALES = dict(head.LEVELS)
_REPEATS = 50


def kernel_cases(bench: Bench) -> Iterator[tuple[KernelSpec, Case]]:
    """Yield every large case; on a CPU one small case of each operator."""
    for spec in SPECS.values():
        for case in spec.cases if bench.cuda else spec.cases[:1]:
            if case.large or not bench.cuda:
                yield spec, case


def kernel_calls(spec: KernelSpec, case: Case, bench: Bench) -> dict[str, Call]:
    """Return what is to be timed for one case in float16 (fidelity_reduce: float32), by provider."""
    arguments = _arguments(spec, case, bench)
    found: dict[str, Call] = {"torch-eager": partial(spec.reference, *arguments)}
    if bench.cuda:
        found["triton"] = partial(spec.op, *arguments)
    official = _official(spec, case, arguments)
    if official is not None:
        found["official"] = official
    return found


def compiled_call(spec: KernelSpec, case: Case, bench: Bench) -> Call:
    """Return the reference through torch.compile, for exactly the shapes of a case. It compiles when it is called."""
    torch.compiler.reset()  # or it would give up after a few shapes
    return partial(torch.compile(spec.reference, dynamic=False), *_arguments(spec, case, bench))


def _arguments(spec: KernelSpec, case: Case, bench: Bench) -> tuple[Any, ...]:
    return spec.arguments(case, torch.float16 if torch.float16 in spec.dtypes else torch.float32, bench.device)


def _official(spec: KernelSpec, case: Case, arguments: tuple[Any, ...]) -> Call | None:
    """Return the same part of the official head; None where it does what eager torch does.

    The official head resizes the tap, so that its two first convolutions and both GroupNorms run at full size.
    """
    if spec.name == "dual_projection" and case.source[0] in _SCALES:
        x, weight = arguments
        size = [_SCALES[case.source[0]] * side for side in case.source[1:]]
        first, second = weight[:, :, None, None].split([len(weight) // 5, len(weight) - len(weight) // 5])

        def project() -> Tensor:
            resized = F.interpolate(x, size, mode="bilinear", align_corners=False)
            F.conv2d(resized, first)
            return F.conv2d(resized, second)

        return project
    source = {"resize_group_norm_relu": 0, "residual_mix": 2}.get(spec.name)
    if source is None or case.source[1:] == case.target[1:]:
        return None
    resized = F.interpolate(arguments[source], case.target[1:], mode="bilinear", align_corners=False)
    return partial(spec.reference, *arguments[:source], resized, *arguments[source + 1 :])


def kernel_rows(
    spec: KernelSpec, case: Case, provider: str, call: Call, bench: Bench, limits: Ceilings
) -> Iterator[Row]:
    """Yield times in CUDA graphs, and what the time from memory is in traffic and arithmetic of the operator.

    ``time`` is of one of many calls in a graph: inputs and outputs are in the L2 cache, as they are in the head.
    ``time from memory`` is of a single call after a flush, with the few microseconds that any graph takes to start.
    """
    row = partial(bench.row, spec.name, provider, str(case))
    yield row("time", "us", bench.seconds(bench.graph(call, _REPEATS)).map(lambda s: 1e6 * s / _REPEATS))
    spread = bench.seconds(bench.graph(call))
    element = 2 if torch.float16 in spec.dtypes else 4
    traffic, flops = spec.traffic_bytes(case, element), spec.flops(case)
    yield row("time from memory", "us", spread.map(lambda s: 1e6 * s))
    yield row("bandwidth", "GB/s", spread.map(lambda s: 1e-9 * traffic / s))
    yield row("share of copy", "%", spread.map(lambda s: 100 * traffic / s / limits.copy.p50))
    if spec.name == "dual_projection":
        yield row("rate", "TFLOP/s", spread.map(lambda s: 1e-12 * flops / s))
        yield row("share of matmul", "%", spread.map(lambda s: 100 * flops / s / limits.matmul.p50))


def head_calls(bench: Bench) -> dict[str, Call]:
    """Return the whole head in float16 at the size of Stable Diffusion 1.5, by provider; tiny and float32 on a CPU."""
    small, dtype = not bench.cuda, torch.float16 if bench.cuda else torch.float32
    probe = head.probe(bench.device, dtype, small)
    taps, embedding = head.inputs(bench.device, dtype, 8 if small else 64, small=small)
    modules: dict[str, Any] = {
        "official": OfficialHead.of(probe),
        "reordered": probe,
        "fused": FusedProbe(probe),
    }
    if bench.cuda:
        torch.compiler.reset()
        modules["reordered, torch.compile"] = torch.compile(probe, dynamic=False)
    return {name: partial(module, taps, embedding) for name, module in modules.items()}


def head_rows(bench: Bench) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Yield the name and measurement of every way to run the head: launched by Python, and as a CUDA graph."""
    case = "SD 1.5, 9 taps, B1, 64x64" if bench.cuda else "tiny"
    for name, call in head_calls(bench).items():
        for provider, graphed in ((name, False), (f"{name}, CUDA graph", True)):

            def measure(provider: str = provider, call: Call = call, graphed: bool = graphed) -> Row:
                spread = bench.seconds(bench.graph(call) if graphed else call)
                return bench.row("probe_head", provider, case, "time", "us", spread.map(lambda s: 1e6 * s))

            yield provider, measure


def head_goals(times: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Return the goals of the head that its times (provider -> seconds, or any one unit) decide."""
    fused = times.get("fused, CUDA graph")
    goals: dict[str, dict[str, Any]] = {}
    for other, least in (
        ("official", 3.0),
        ("reordered, torch.compile", 1.3),
        ("reordered, torch.compile, CUDA graph", 1.3),
    ):
        if fused and other in times:
            goals[f"fused head in a CUDA graph, times faster than: {other}"] = at_least(times[other] / fused, least)
    return goals


def at_least(value: float, least: float) -> dict[str, Any]:
    """Return a goal that is met from ``least`` on."""
    return {"value": value, "at_least": least, "met": value >= least}


def at_most(value: float, most: float) -> dict[str, Any]:
    """Return a goal that is met up to ``most``."""
    return {"value": value, "at_most": most, "met": value <= most}


def ceiling_rows(bench: Bench, limits: Ceilings) -> Iterator[Row]:
    """Yield the ceilings themselves."""
    for provider, metric, unit, spread, factor in (
        ("copy", "bandwidth", "GB/s", limits.copy, 1e-9),
        ("matmul float16", "rate", "TFLOP/s", limits.matmul, 1e-12),
        ("launch in a CUDA graph", "time", "us", limits.launch, 1e6),
    ):
        scaled: Spread = spread.map(lambda value, factor=factor: factor * value)  # type: ignore[misc]
        yield bench.row("ceiling", provider, "", metric, unit, scaled)
