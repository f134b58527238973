"""Finds the fastest launch configuration of each kernel on this GPU, and writes it into the table of its kind."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.timing import Bench
from engines.errors import EngineError
from engines.kernels import SPECS, KernelSpec, tuning
from engines.kernels.check import check
from engines.kernels.spec import Case
from engines.kernels.tuning import LaunchConfig

FOLDER = Path(tuning.__file__).with_name("tuning")

_PASSES = 2
_WIDEST = 4  # bytes of an element that the kernels take
# A matrix product has other limits in each dtype; the others do the same work, and take what is best in float16.
_DTYPES = {"dual_projection": (torch.float16, torch.float32), "fidelity_reduce": (torch.float32,)}
_BLOCKS: dict[str, dict[str, tuple[int, ...]]] = {
    "dual_projection": {"BLOCK_M": (32, 64, 128), "BLOCK_N": (32, 64, 128), "BLOCK_K": (16, 32, 64, 128)},
    "resize_group_norm_relu": {
        "BLOCK_C": (2, 4, 8),
        "BLOCK_P": (256, 512, 1024),
        "ROWS": (1024, 2048),
        "CELLS": (128, 256, 512),
    },
    "residual_mix": {
        "BLOCK_C": (2, 4, 8, 16),
        "BLOCK_P": (256, 512, 1024),
        "ROWS": (1024, 2048),
        "CELLS": (128, 256, 512),
    },
    "fidelity_reduce": {"BLOCK": (256, 512, 1024, 2048)},
}
_WARPS = (4, 8, 16)
_STAGES: dict[str, tuple[int, ...]] = {"dual_projection": (2, 3, 4, 5)}
_SPLITS: dict[str, tuple[int, ...]] = {"resize_group_norm_relu": (1, 2, 4, 8), "residual_mix": (1, 2, 4, 8)}

Time = Callable[[LaunchConfig], float]


@dataclass(frozen=True)
class Best:
    """What was found for one size of problem."""

    size: int
    element_bytes: int
    config: LaunchConfig


def neighbours(op: str, config: LaunchConfig, axis: str) -> Iterator[LaunchConfig]:
    """Yield the config with each other value of one axis: a block size, ``num_warps``, ``num_stages`` or ``split``."""
    choices = {"num_warps": _WARPS, "num_stages": _STAGES.get(op, ()), "split": _SPLITS.get(op, ()), **_BLOCKS[op]}
    for value in choices[axis]:
        change: dict[str, Any] = {axis: value}
        if axis in config.constants:
            found = replace(config, constants={**config.constants, **change})
        else:
            found = replace(config, **change)
        if found != config:
            yield found


def descend(op: str, start: LaunchConfig, time: Time) -> LaunchConfig:
    """Improve one axis after the other until none helps, twice around at most.

    Args:
        op: name of the operator.
        start: launch configuration to begin with.
        time: returns the seconds with a config, infinite if it does not fit the GPU.

    Raises:
        EngineError: if no config works.
    """
    seen = {repr(start): time(start)}
    best, seconds = start, seen[repr(start)]
    for _ in range(_PASSES):
        before = best
        for axis in (*_BLOCKS[op], "num_warps", "num_stages", "split"):
            for candidate in neighbours(op, best, axis):
                key = repr(candidate)  # a mapping inside of it cannot be hashed
                found = seen[key] if key in seen else seen.setdefault(key, time(candidate))
                if found < seconds:
                    best, seconds = candidate, found
        if best == before:
            break
    if not math.isfinite(seconds):
        raise EngineError(f"no launch configuration of {op} runs on this GPU, from {start} on.")
    return replace(best, measured=True)


def rows(found: Sequence[Best]) -> list[dict[str, Any]]:
    """Return rows of a table; between two sizes that were measured, the nearer one (as a ratio) decides.

    What was found for the widest elements is for wider ones too.
    """
    table: list[dict[str, Any]] = []
    widths = sorted({best.element_bytes for best in found})
    for width in widths:
        ordered = sorted((best for best in found if best.element_bytes == width), key=lambda best: best.size)
        limits = [math.isqrt(one.size * other.size) for one, other in pairwise(ordered)]
        for best, limit in zip(ordered, [*limits, None], strict=True):
            values = {name: value for name, value in asdict(best.config).items() if name != "measured"}
            row = {"size": limit, "element_bytes": width if width < widths[-1] else _WIDEST, **values}
            if table and {**table[-1], "size": limit} == row:
                table.pop()
            table.append(row)
    return table


def write(folder: Path, op: str, capability: int, table: list[dict[str, Any]]) -> Path:
    """Put the rows of one kind of GPU into an operator's file, one row a line; return the file."""
    path = folder / f"{op}.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["tables"][str(capability)] = {"measured": True, "rows": table}
    known = sorted((name for name in content["tables"] if name != "default"), key=int)
    parts = []
    for name in (*known, "default"):
        entry = content["tables"][name]
        lines = ",\n".join(f"        {json.dumps(row)}" for row in entry["rows"])
        head = f'    "{name}": {{\n      "measured": {json.dumps(entry["measured"])},\n      "rows": [\n'
        parts.append(f"{head}{lines}\n      ]\n    }}")
    body = ",\n".join(parts)
    path.write_text(
        f'{{\n  "size": {json.dumps(content["size"])},\n  "tables": {{\n{body}\n  }}\n}}\n', encoding="utf-8"
    )
    return path


def tune(spec: KernelSpec, bench: Bench, progress: Callable[[str], None]) -> list[Best]:
    """Return the best config for every size of problem among the large cases.

    Raises:
        EngineError: if no config runs, or the fastest one computes something wrong.
    """
    groups: dict[tuple[int, int], list[tuple[Case, torch.dtype]]] = {}
    starts: dict[tuple[int, int], LaunchConfig] = {}
    for dtype in _DTYPES.get(spec.name, (torch.float16,)):
        for case in spec.cases:
            if case.large:
                size, width, config = _looked_up(spec, case, dtype, bench)
                groups.setdefault((size, width), []).append((case, dtype))
                starts[size, width] = config
    found = []
    for (size, width), members in groups.items():
        calls = [partial(spec.op, *spec.arguments(case, dtype, bench.device)) for case, dtype in members]
        best = descend(spec.name, starts[size, width], partial(_seconds, bench, calls))
        with chosen(lambda *_: best):  # noqa: B023  used before the loop goes on
            wrong = [p for case, dtype in members for p in check(spec, case, bench.device, dtype).problems]
        if wrong:
            raise EngineError(f"{spec.name} with {best} is wrong: {'; '.join(wrong)}.")
        progress(f"{spec.name} size {size}, {width} bytes: {best}")
        found.append(Best(size, width, best))
    return found


@contextmanager
def chosen(choose: Callable[..., LaunchConfig]) -> Iterator[None]:
    """Let kernels take their launch configs from ``choose`` inside of the block."""
    with mock.patch.object(tuning, "choose", choose):
        yield


def _looked_up(spec: KernelSpec, case: Case, dtype: torch.dtype, bench: Bench) -> tuple[int, int, LaunchConfig]:
    """Return the size of the problem, bytes of an element and config that the kernel asks its table for."""
    seen: list[tuple[int, int, LaunchConfig]] = []
    original = tuning.choose

    def note(op: str, capability: int | None, size: int, element_bytes: int) -> LaunchConfig:
        seen.append((size, element_bytes, original(op, capability, size, element_bytes)))
        return seen[-1][2]

    with chosen(note):
        spec.run_kernel(*spec.arguments(case, dtype, bench.device))
    return seen[0]


def _seconds(bench: Bench, calls: Sequence[Callable[[], torch.Tensor]], config: LaunchConfig) -> float:
    """Return the geometric mean over the calls; infinite if the config does not fit the GPU."""
    from triton.errors import TritonError

    try:
        with chosen(lambda *_: config):
            times = [bench.seconds(bench.graph(call)).p50 for call in calls]
    except (TritonError, EngineError):  # too much shared memory, too many registers
        return math.inf
    return math.exp(sum(map(math.log, times)) / len(times))


def tune_all(bench: Bench, progress: Callable[[str], None], ops: Sequence[str]) -> Iterator[Path]:
    """Tune kernels for the GPU and write their tables, one after the other."""
    major, minor = torch.cuda.get_device_capability(bench.device)
    for op in ops:
        yield write(FOLDER, op, 10 * major + minor, rows(tune(SPECS[op], bench, progress)))
