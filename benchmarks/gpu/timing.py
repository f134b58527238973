"""Times of calls on a GPU, in rows that say where, when and of which code they are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch

from benchmarks.gpu.machine import checkout, driver_version, version_of
from engines.capture import CudaRecorder

_WARM_UP_SECONDS = 0.02
_SECONDS = 0.06
_LEAST_CALLS = 20
_MOST_CALLS = 200
_FLUSH_BYTES = 256 << 20  # more than the L2 cache of any GPU


@dataclass(frozen=True)
class Row:
    """One number.

    Attributes:
        name: what was measured: an operator, ``probe_head``, ``step`` ...
        provider: implementation that was measured.
        case: sizes of what was measured.
        metric: ``time``, ``bandwidth``, ``rate``, or a share of a measured ceiling.
        unit: unit of p50, p20 and p80.
        p50: median of the values.
        p20: value that a fifth of all is below; for times the better side, for rates the worse.
        p80: value that a fifth of all is above.
        n: number of values.
        gpu: name of the device.
        driver: version of the GPU's driver.
        torch: version of torch.
        triton: version of Triton, or ``not installed``.
        commit: commit of the checkout, or ``unknown``.
        dirty: whether files differ from the commit; None if that is not known.
        timestamp: time in ISO 8601, UTC.
    """

    name: str
    provider: str
    case: str
    metric: str
    unit: str
    p50: float
    p20: float
    p80: float
    n: int
    gpu: str
    driver: str
    torch: str
    triton: str
    commit: str
    dirty: bool | None
    timestamp: str


@dataclass(frozen=True)
class Spread:
    """Quantiles of ``n`` values."""

    p50: float
    p20: float
    p80: float
    n: int

    def map(self, function: Callable[[float], float]) -> Spread:
        """Return quantiles of a monotonous function of the values."""
        p20, p80 = sorted((function(self.p20), function(self.p80)))
        return Spread(function(self.p50), p20, p80, self.n)


class Bench:
    """Times calls on one device.

    Args:
        device: ``cuda``, ``cuda:<i>``, or ``cpu`` for a dry run.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        commit, dirty = checkout()
        self._about: dict[str, Any] = {
            "gpu": torch.cuda.get_device_name(self.device) if self.cuda else "none",
            "driver": driver_version(),
            "torch": str(torch.__version__),
            "triton": version_of("triton"),
            "commit": commit,
            "dirty": dirty,
        }
        self._flush = torch.empty(_FLUSH_BYTES if self.cuda else 1, dtype=torch.int8, device=self.device)
        self._recorder = CudaRecorder()

    def row(self, name: str, provider: str, case: str, metric: str, unit: str, spread: Spread) -> Row:
        """Return a row with what is known of machine and code."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        numbers = (spread.p50, spread.p20, spread.p80, spread.n)
        return Row(name, provider, case, metric, unit, *numbers, **self._about, timestamp=now)

    def seconds(self, call: Callable[[], object], *, flush: bool = True, least: int = _LEAST_CALLS) -> Spread:
        """Return the time a call, each time from an empty L2 cache if ``flush``.

        What the GPU waits for Python counts, except where the flush hides it: record short calls with ``graph`` first.
        """
        started = time.perf_counter()
        turns = 0
        while time.perf_counter() - started < _WARM_UP_SECONDS or turns < 2:
            call()
            self.wait()
            turns += 1
        estimate = (time.perf_counter() - started) / turns
        count = max(least, min(_MOST_CALLS, int(_SECONDS / estimate)))
        return _spread(self._cuda_times(call, count, flush) if self.cuda else [_wall(call) for _ in range(count)])

    def graph(self, call: Callable[[], torch.Tensor], repeats: int = 1) -> Callable[[], object]:
        """Make so many calls one CUDA graph, which costs Python one launch; on a CPU the calls themselves."""

        def repeated() -> torch.Tensor:
            for _ in range(repeats - 1):
                call()
            return call()

        if not self.cuda:
            return repeated
        replay, _ = self._recorder(lambda _inputs: {"out": repeated()}, {"flush": self._flush})
        return replay

    def wait(self) -> None:
        """Wait until the GPU has nothing left to do."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def _cuda_times(self, call: Callable[[], object], count: int, flush: bool) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]  # type: ignore[no-untyped-call]
        for start, end in pairs:
            if flush:
                self._flush.zero_()
            start.record()
            call()
            end.record()
        self.wait()
        return [1e-3 * start.elapsed_time(end) for start, end in pairs]


def _wall(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _spread(values: list[float]) -> Spread:
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return Spread(cuts[4], cuts[1], cuts[7], len(values))


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reaches in the best of cases.

    Attributes:
        copy: rate of a large copy, read and written, in bytes a second.
        matmul: rate of a large float16 matrix product on random values, in FLOP a second.
        launch: time of a kernel that does nothing to speak of, in a CUDA graph of many, in seconds.
    """

    copy: Spread
    matmul: Spread
    launch: Spread


def ceilings(bench: Bench) -> Ceilings:
    """Measure them."""
    elements, side = (1 << 30, 8192) if bench.cuda else (1 << 10, 8)
    source = torch.empty(elements, dtype=torch.int8, device=bench.device)
    target = torch.empty_like(source)
    copy = bench.seconds(lambda: target.copy_(source)).map(lambda s: 2 * elements / s)
    a, b = (torch.randn(side, side, device=bench.device).half() for _ in range(2))
    matmul = bench.seconds(lambda: a @ b).map(lambda s: 2 * side**3 / s)
    one, launches = torch.zeros(1, device=bench.device), 100
    launch = bench.seconds(bench.graph(lambda: one.add_(1), launches)).map(lambda s: s / launches)
    return Ceilings(copy, matmul, launch)
