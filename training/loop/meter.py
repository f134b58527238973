"""Losses between two rows of the log: collected on the device, averaged over processes, and checked to be finite."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from icexport.errors import IcexportError

GRADIENT_NORM = "gradient_norm"
OVERFLOWS = 20
"""Updates that fp16 skips in a row, while its loss scale falls, when training is taken to be broken."""


class NonFiniteError(IcexportError, FloatingPointError):
    """A loss or a gradient that is NaN or infinite."""


@dataclass
class _Micro:
    """What one micro step of this process left behind: the values stay on the device."""

    step: int
    ids: list[str]
    losses: dict[str, Tensor]


@dataclass
class _Sums:
    """What one process adds to the log; small, and exchanged as an object."""

    rank: int
    totals: dict[str, tuple[float, int]] = field(default_factory=dict)
    faults: list[tuple[int, str]] = field(default_factory=list)


class Meter:
    """Means of losses over micro steps and processes.

    Reading a value from the GPU makes the CPU wait until everything queued before it is done, and only then can the
    next update be queued. So losses and gradient norms stay where they are until ``collect``, which the trainer calls
    before every row of the log, every checkpoint and every validation. An update that is not finite is thus found up
    to that much later, under its own number and with its own pictures, and never reaches a checkpoint or a result.

    Args:
        accelerator: accelerator of the run.
        totals: sums and counts that a checkpoint between two rows has saved.

    Attributes:
        totals: sum and count of each loss since the last row, over all processes.
        seconds: time of training since the last row, pauses left out.
        pictures: number of pictures trained on since the last row, by all processes.
    """

    def __init__(self, accelerator: Accelerator, totals: Mapping[str, Any] | None = None) -> None:
        self._accelerator = accelerator
        self.totals: dict[str, tuple[float, int]] = {k: (v[0], v[1]) for k, v in (totals or {}).items()}
        self.seconds, self.pictures = 0.0, 0
        self._micros: list[_Micro] = []
        self._norms: list[Tensor] = []
        self._overflows = 0
        self._since = time.perf_counter()

    def add(self, step: int, ids: list[str], losses: Mapping[str, Tensor]) -> None:
        """Take note of one micro step of update ``step`` (from 1)."""
        self._micros.append(_Micro(step, ids, {name: value.detach() for name, value in losses.items()}))
        self.pictures += len(ids) * self._accelerator.num_processes

    def add_norm(self, norm: Tensor) -> None:
        """Take note of the gradient's norm at the end of an update."""
        self._norms.append(norm)

    def go_on(self) -> None:
        """Start the clock again after a pause; ``collect`` stops it."""
        self._since = time.perf_counter()

    def collect(self, hint: str) -> None:
        """Add what was noted to ``totals``; every process must call this.

        Args:
            hint: where a stopped run would go on, for the message.

        Raises:
            NonFiniteError: in every process, if a loss or gradient of any of them is not finite.
        """
        if not self._micros:
            return
        sums = self._reduce()
        self.seconds += time.perf_counter() - self._since
        gathered: list[_Sums] = gather_object([sums])
        faults = [(step, other.rank, text) for other in gathered for step, text in other.faults]
        if faults:
            self._fail(faults, hint)
        for other in gathered:
            for name, (total, count) in other.totals.items():
                before = self.totals.get(name, (0.0, 0))
                self.totals[name] = (before[0] + total, before[1] + count)

    def take(self) -> dict[str, float]:
        """Return means since the last row; a loss that some micro steps lack is averaged over those that have it."""
        means = {name: total / count for name, (total, count) in self.totals.items()}
        self.totals, self.seconds, self.pictures = {}, 0.0, 0
        return means

    def _reduce(self) -> _Sums:
        """Bring everything noted to the CPU with one transfer."""
        values = [v for micro in self._micros for v in micro.losses.values()] + self._norms
        device = self._accelerator.device
        numbers = iter(torch.stack([v.float().to(device) for v in values]).tolist())
        sums = _Sums(self._accelerator.process_index)
        ids: dict[int, list[str]] = {}
        for micro in self._micros:
            losses = {name: next(numbers) for name in micro.losses}
            for name, value in losses.items():
                total, count = sums.totals.get(name, (0.0, 0))
                sums.totals[name] = (total + value, count + 1)
            ids.setdefault(micro.step, []).extend(micro.ids)
            if not math.isfinite(losses["loss"]):
                sums.faults.append((micro.step, f"losses {losses} of the pictures {', '.join(micro.ids)}"))
        self._check_norms(sums, dict(zip(ids, numbers, strict=True)), ids)
        self._micros, self._norms = [], []
        return sums

    def _check_norms(self, sums: _Sums, norms: dict[int, float], ids: dict[int, list[str]]) -> None:
        # An fp16 gradient that overflows is no fault: its update is skipped and the loss scale is lowered.
        limit = OVERFLOWS if self._accelerator.mixed_precision == "fp16" else 1
        reported = {step for step, _ in sums.faults}
        for step, norm in norms.items():
            if math.isfinite(norm):
                self._overflows = 0
                total, count = sums.totals.get(GRADIENT_NORM, (0.0, 0))
                sums.totals[GRADIENT_NORM] = (total + norm, count + 1)
                continue
            self._overflows += 1
            if self._overflows >= limit and step not in reported:
                sums.faults.append((step, f"gradient norm {norm} after the pictures {', '.join(ids[step])}"))

    def _fail(self, faults: list[tuple[int, int, str]], hint: str) -> None:
        first = min(step for step, _, _ in faults)
        found = sorted((rank, text) for step, rank, text in faults if step == first)
        losses = [(rank, text) for rank, text in found if text.startswith("losses")]
        lines = "; ".join(f"process {rank}: {text}" for rank, text in losses or found)
        raise NonFiniteError(
            f"Training stopped at step {first}: loss or gradient is not finite ({lines}). {hint} Nothing was "
            "overwritten. Look at those pictures and their control maps; a lower learning rate, a warm-up or another "
            "precision, each in a new output folder, are the usual remedies."
        )
