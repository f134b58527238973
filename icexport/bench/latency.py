"""Latency of a bundle beside diffusers: same process, weights, seed and scheduler, rounds interleaved.

Every round runs every provider once, so that a noisy machine is noisy for all of them. Speed stands beside the control
score and the difference to diffusers' pictures: a fast engine that draws something else is no win.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icexport.backends.engines import built_backends, choose_backend, default_device
from icexport.bundle.source import recorded_source
from icexport.bundle.store import Bundle
from icexport.errors import UsageError
from icexport.fidelity.metrics import psnr
from icexport.graphs.profile import SizeRange
from icexport.host.versions import machine
from icexport.models.precision import precision
from icexport.progress import Progress, expect, silent
from icexport.runtime.drawing import Request, draw
from icexport.runtime.eager import load_eager
from icexport.runtime.pipeline import InnerControlPipeline

BASELINE = "diffusers"
"""Name of the eager ``StableDiffusionControlNetPipeline``, in float32 or the bundle's float16."""

_PROMPT = "a red apple"


@dataclass(frozen=True)
class ProviderLatency:
    """What was measured of one provider.

    Attributes:
        name: name of the provider, ``diffusers`` or a backend.
        median: median time of one call (all its pictures), in seconds.
        p95: 95th percentile of the time of one call.
        best: smallest time of one call.
        seconds_per_step: median time of one denoising step, ControlNet and UNet; None where only one step is made.
        load_seconds: time from files to a pipeline that is ready.
        memory_mb: growth of the process's (CPU) or the device's (CUDA) memory while loading and at the first call, in
            10^6 bytes.
        score: mean control score of the pictures.
        psnr_db: PSNR of the pictures against the baseline's; None for the baseline itself or without one.
    """

    name: str
    median: float
    p95: float
    best: float
    seconds_per_step: float | None
    load_seconds: float
    memory_mb: float
    score: float
    psnr_db: float | None


@dataclass(frozen=True)
class LatencyReport:
    """A table of providers with everything that is needed to repeat it."""

    bundle: str
    key: str
    dtype: str
    condition: str
    metric: str
    height: int
    width: int
    batch: int
    steps: int
    warmup: int
    iterations: int
    seed: int
    device: str
    scheduler: str
    machine: dict[str, str]
    providers: list[ProviderLatency]

    def to_json(self) -> str:
        """Return one JSON document."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def to_markdown(self) -> str:
        """Return a table with a line on the machine."""
        base = next((p.median for p in self.providers if p.name == BASELINE), None)
        lines = [
            "| provider | median s | p95 s | min s | ms/step | speed-up | load s | memory MB "
            f"| {self.metric} | PSNR dB |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for p in self.providers:
            speed = f"{base / p.median:.2f}x" if base else ""
            same = "" if p.psnr_db is None else f"{p.psnr_db:.1f}"
            step = "" if p.seconds_per_step is None else f"{1000 * p.seconds_per_step:.1f}"
            times = f"{p.median:.3f} | {p.p95:.3f} | {p.best:.3f} | {step} | {speed}"
            lines.append(f"| {p.name} | {times} | {p.load_seconds:.1f} | {p.memory_mb:.0f} | {p.score:.3f} | {same} |")
        what = (
            f"{self.condition}, {self.dtype}, {self.batch} x {self.height} x {self.width} px, {self.steps} steps of "
            f"{self.scheduler}, {self.iterations} rounds after {self.warmup} of warm-up, on {self.device}"
        )
        machine = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        return "\n".join([*lines, "", f"{what}. {machine}."]) + "\n"

    def plot(self, path: Path) -> None:
        """Draw a bar chart of the medians with their range.

        Raises:
            UsageError: matplotlib is missing.
        """
        try:
            from matplotlib.figure import Figure  # not pyplot: no window system, no global state
        except ImportError as error:
            raise UsageError("The plot needs matplotlib: pip install 'icexport[report]'") from error
        figure = Figure(figsize=(6, 0.6 * len(self.providers) + 1.2))
        axis = figure.subplots()
        names = [p.name for p in self.providers][::-1]
        medians = [p.median for p in self.providers][::-1]
        spread = [
            [p.median - p.best for p in self.providers][::-1],
            [max(0.0, p.p95 - p.median) for p in self.providers][::-1],
        ]
        axis.barh(names, medians, xerr=spread, color="#4878a8", error_kw={"elinewidth": 1, "capsize": 3})
        axis.set_xlabel(f"seconds for {self.steps} steps: median, min to p95")
        figure.tight_layout()
        figure.savefig(path, dpi=120)

    def save(self, output: Path) -> list[Path]:
        """Write ``<output>.json``, ``.md`` and ``.png``; return their paths."""
        output.parent.mkdir(parents=True, exist_ok=True)
        paths = [output.with_name(f"{output.name}.{suffix}") for suffix in ("json", "md", "png")]
        paths[0].write_text(self.to_json(), encoding="utf-8")
        paths[1].write_text(self.to_markdown(), encoding="utf-8")
        self.plot(paths[2])
        return paths


def run_latency(
    bundle: Bundle | str | Path,
    *,
    backends: Sequence[str] | None = None,
    steps: int = 20,
    warmup: int = 1,
    iterations: int = 5,
    batch: int = 1,
    seed: int = 0,
    device: str | None = None,
    cuda_graph: bool = False,
    baseline: bool = True,
    progress: Progress = silent,
) -> LatencyReport:
    """Measure whole calls, prompt to pictures, guidance 7.5, no fidelity check inside the clock.

    Args:
        bundle: a bundle or its folder.
        backends: backends to measure; default: all that the bundle was built for.
        steps: number of denoising steps.
        warmup: number of rounds that do not count.
        iterations: number of rounds that count.
        batch: number of pictures per call.
        seed: seed of the noise.
        device: ``cpu``, ``cuda`` or ``cuda:<i>``; None: as in ``InnerControlPipeline.from_pretrained``.
        cuda_graph: launch each step of our pipelines as one CUDA graph.
        baseline: also run diffusers eager on the model that the bundle was made from.
        progress: told what is being done; see ``icexport.progress.Progress``.

    Raises:
        UsageError: a count is below 1, or the batch is outside the profile.
        BundleError: the bundle cannot be used, or was not built for a backend.
        CheckpointError: the model that the bundle was made from is not there any more or was changed (baseline only).
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    manifest = bundle.manifest
    if min(steps, iterations, batch) < 1 or warmup < 0:
        raise UsageError("steps, iterations and batch must be at least 1, warmup at least 0.")
    if batch not in manifest.profile.batch:
        raise UsageError(f"batch {batch}: the bundle takes {manifest.profile.batch} pictures per call.")
    wanted = tuple(backends or built_backends(bundle))
    device = device or max(default_device(bundle, name) for name in wanted)  # one device for all: cuda if one needs it
    names = [choose_backend(bundle, name, device) for name in wanted]
    height, width = manifest.profile.height.opt, manifest.profile.width.opt
    control = _test_map(batch, height, width)
    request = Request(_PROMPT, range(seed, seed + batch), steps=steps)
    pipes: dict[str, Any] = {}
    loading: dict[str, float] = {}
    memory: dict[str, float] = {}
    pictures: dict[str, Tensor] = {}

    def call(name: str, callback: Callable[..., dict[str, Tensor]] | None = None) -> Tensor:
        return draw(pipes[name], control, request, calls=SizeRange(batch, batch, batch), callback=callback).pictures

    timed = [BASELINE, *names] if baseline else names
    expect(progress, len(timed) + 2)
    for name in timed:
        progress(f"load {name}")
        gc.collect()
        before, started = _memory(device), time.perf_counter()
        if name == BASELINE:
            pipes[name] = load_eager(recorded_source(bundle), precision(manifest.dtype).torch, device=device)
        else:
            pipes[name] = InnerControlPipeline.from_pretrained(
                bundle, backend=name, device=device, cuda_graph=cuda_graph
            )
        loading[name] = time.perf_counter() - started
        pipes[name].set_progress_bar_config(disable=True)
        pictures[name] = call(name)
        memory[name] = _memory(device) - before
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for turn in range(warmup + iterations):
        for place, name in enumerate(pipes):
            progress("measure", turn * len(pipes) + place, (warmup + iterations) * len(pipes))
            started = time.perf_counter()
            call(name)  # ends with a copy to the host, which waits for the device
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - started)
    condition = bundle.condition()
    providers: list[ProviderLatency] = []
    for name, times in seconds.items():
        progress("time single steps", len(providers), len(seconds))
        ordered = sorted(times)
        same = psnr(pictures[name], pictures[BASELINE]) if baseline and name != BASELINE else None
        providers.append(
            ProviderLatency(
                name=name,
                median=statistics.median(times),
                p95=ordered[round(0.95 * (len(ordered) - 1))],
                best=ordered[0],
                seconds_per_step=_step_seconds(functools.partial(call, name), device),
                load_seconds=loading[name],
                memory_mb=memory[name] / 1e6,
                score=float(condition.score(pictures[name], control).mean()),
                psnr_db=None if same is None else float(same.mean()),
            )
        )
    scheduler = type(next(iter(pipes.values())).scheduler).__name__
    return LatencyReport(
        str(bundle.path), manifest.key, manifest.dtype, condition.name, condition.metric, height, width, batch, steps,
        warmup, iterations, seed, device, scheduler, machine(device), providers,
    )  # fmt: skip


def _step_seconds(call: Callable[[Callable[..., dict[str, Tensor]]], object], device: str) -> float | None:
    """Measure the median time between the ends of two steps, in a call of its own: it waits for the device."""
    ends: list[float] = []

    def ended(_pipe: Any, _step: int, _time: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        ends.append(time.perf_counter())
        return tensors

    call(ended)
    return statistics.median(b - a for a, b in pairwise(ends)) if len(ends) > 1 else None


def _test_map(batch: int, height: int, width: int) -> Tensor:
    """Return a ring of edges, ``[batch,3,H,W]``: something that can be followed at any size."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    ring = ((x.square() + y.square()).sqrt() - 0.7).abs() < 2.0 / max(height, width)
    return ring.float().expand(batch, 3, -1, -1).contiguous()


def _memory(device: str) -> float:
    """Count bytes in use: on CUDA the whole device's, for ONNX Runtime bypasses torch's allocator; else resident."""
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(device)
        return float(total - free)
    statm = Path("/proc/self/statm")
    return float(int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")) if statm.exists() else 0.0
