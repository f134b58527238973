"""Reading the control back while sampling: the probe on the conditional half, errors kept on the device."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from engines.base import Engine
from icexport.errors import UsageError
from icexport.fidelity.normalise import control_target, normalise
from icexport.fidelity.report import StepReading
from icexport.models.probe import ProbeConfig


def finished(monitors: Sequence[FidelityMonitor]) -> tuple[list[StepReading], Tensor | None]:
    """Return the readings of all monitors as if one had read all of their pictures; see ``FidelityMonitor.finish``.

    A call that not every one of them has read, as when pictures end early, is left out.
    """
    parts = [monitor.finish() for monitor in monitors]
    maps = [heat_map for _, heat_map in parts if heat_map is not None]
    steps = [
        replace(same[0], errors=[error for reading in same for error in reading.errors])
        for same in zip(*(readings for readings, _ in parts), strict=False)
    ]
    return steps, torch.cat(maps) if maps else None


class FidelityMonitor:
    """Collects the probe's readings of one generation; nothing leaves the device before ``finish``.

    Args:
        probe: the probe's engine.
        config: the probe's config: which taps it reads, and what its readings mean.
        control_maps: control maps ``[b,3,H,W]`` in [0,1], one for each picture.
        steps: 0-based UNet calls to read.
        kernels: whether to sum up with ``torch.ops.icexport.fidelity_reduce``, which makes no map of the control map's
            size.
    """

    def __init__(
        self,
        probe: Engine,
        config: ProbeConfig,
        control_maps: Tensor,
        steps: Collection[int],
        kernels: bool = False,
    ) -> None:
        self._probe = probe
        self._config = config
        self._taps = [f"tap_{i}" for i in range(len(config.dims))]
        self._embedding = [] if config.time_embed_dim is None else ["time_embedding"]
        target, _ = control_target(control_maps.to(probe.device, torch.float32), config.normaliser)
        self._control = target.expand(-1, 3, -1, -1).contiguous()  # three channels, as the kernel takes them
        self._steps = steps
        self._mean_error = self._reduce if kernels else self._mean
        self._calls = 0
        self._indices: list[int] = []
        self._errors: list[Tensor] = []
        self._times: list[Tensor] = []
        self._last: Tensor | None = None

    @property
    def expected(self) -> int:
        """How many readings there are if every call to read is made."""
        return len(self._steps)

    def wants(self, call: int) -> bool:
        """Tell whether a UNet call, counted from 0, is to be read."""
        return call in self._steps

    def next_call(self) -> list[str]:
        """Name the UNet's outputs to read at its next call: the taps and the time embedding, or none."""
        index, self._calls = self._calls, self._calls + 1
        return [*self._taps, *self._embedding] if self.wants(index) else []

    def __call__(self, timestep: Tensor, outputs: dict[str, Tensor]) -> None:
        """Read the taps of the call that ``next_call`` was asked about.

        Of the last samples, because with guidance the unconditional half comes first.

        Args:
            timestep: timestep of each sample, ``[B]``; one call reads pictures of one timestep.
            outputs: taps ``[B,C,h,w]``, B being as many as the control maps, or twice that; time embeddings ``[B,E]``.

        Raises:
            UsageError: the batch does not match the control maps.
        """
        batch, samples = len(self._control), len(outputs[self._taps[0]])
        if samples not in (batch, 2 * batch):
            raise UsageError(
                f"The UNet ran on {samples} samples, but there are {batch} control maps ({batch} or, with guidance, "
                f"{2 * batch} samples expected). Check what callback_on_step_end returns."
            )
        inputs = {name: outputs[name][-batch:] for name in (*self._taps, *self._embedding)}
        self.take(self._calls - 1, timestep[-1], self._probe(inputs)["reading"])

    def take(self, call: int, timestep: Tensor, reading: Tensor) -> None:
        """Take what the probe read.

        Args:
            call: 0-based number of the UNet call.
            timestep: its timestep, a scalar.
            reading: the probe's output, ``[b,C,h,w]``.
        """
        self._last = normalise(reading, self._config.control_range, self._config.normaliser)
        self._indices.append(call)
        self._times.append(timestep)
        self._errors.append(self._mean_error(self._last))

    def _mean(self, reading: Tensor) -> Tensor:
        """Return the mean squared error ``[b]``."""
        return self._difference(reading).square().mean((1, 2, 3))

    def _reduce(self, reading: Tensor) -> Tensor:
        """Compute ``_mean`` by one kernel."""
        sums: Tensor = torch.ops.icexport.fidelity_reduce(reading, self._control)
        return sums[:, 1] / self._control[0].numel()

    def _difference(self, reading: Tensor) -> Tensor:
        """Return the reading minus control map at the control map's size, ``[b,3,H,W]``."""
        size = self._control.shape[-2:]
        return F.interpolate(reading, size=size, mode="bilinear", align_corners=False) - self._control

    def finish(self) -> tuple[list[StepReading], Tensor | None]:
        """Return all readings and the last squared-error map ``[b,h,w]``: the one transfer from the device."""
        if self._last is None:
            return [], None
        table = torch.cat([torch.stack(self._times)[:, None], torch.stack(self._errors)], dim=1).cpu().tolist()
        readings = [StepReading(i, row[0], row[1:]) for i, row in zip(self._indices, table, strict=True)]
        height, width = self._last.shape[-2:]
        heat = F.adaptive_avg_pool2d(self._difference(self._last).square().mean(1), (height, width))
        return readings, heat.cpu()
