"""One call of ControlNet and UNet for pictures that have nothing in common but their size."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engines.base import Engine
from icexport.runtime.components import residual_scale
from icexport.runtime.slots import Slot
from icexport.runtime.step import Deferred, StepGraphs


@dataclass(frozen=True)
class Answer:
    """What one call says of one picture.

    Attributes:
        predicted: the UNet's prediction for each of its rows, ``[rows,C,h,w]``.
        reading: what the probe read, ``[1,C,h,w]``; None: it was not to read.
    """

    predicted: Tensor
    reading: Tensor | None


@dataclass(frozen=True)
class _Steady:
    """What stays the same from call to call while the same pictures are drawn together.

    Attributes:
        key: the pictures, and the strength of each one's control.
        prompt_embeds: of all rows, ``[R,S,D]``.
        controlled: the rows that a ControlNet steers, ``[Q]``; None: all of them.
        control: inputs of the ControlNet for those rows; empty: there are none.
    """

    key: tuple[tuple[int, float], ...]
    prompt_embeds: Tensor
    controlled: Tensor | None
    control: dict[str, Tensor]


class StepModels:
    """ControlNet, UNet and probe, called for rows of several pictures.

    The rows of a picture lie side by side. No module of these models looks from one row to another.

    Args:
        controlnet: its engine.
        unet: its engine.
        probe: its engine; None: nothing is read.
        residuals: channels of each residual, and how many cells of the latents one of its cells covers at each side.
        pictures: how many pictures the probe takes in one call.
        step_graphs: launches both at once; None: they are called.

    Attributes:
        device: where everything lies.
        dtype: of the engines' inputs.
        channels: number of channels of the latents.
        tokens: number of tokens of each prompt; None: any that the profile allows.
        features: number of features of each token.
    """

    def __init__(
        self,
        controlnet: Engine,
        unet: Engine,
        probe: Engine | None,
        residuals: Sequence[tuple[int, int]],
        pictures: int,
        step_graphs: StepGraphs | None = None,
    ) -> None:
        self.device, self.dtype = unet.device, unet.outputs[0].dtype
        shapes = {spec.name: spec.shape for spec in unet.inputs}
        tokens, features = shapes["prompt_embeds"][1:]
        self.channels, self.features = int(shapes["sample"][1]), int(features)
        self.tokens = None if isinstance(tokens, str) else tokens
        self._controlnet, self._unet, self._probe = controlnet, unet, probe
        self._residuals = residuals
        self._taps = [spec.name for spec in probe.inputs] if probe else []
        self._pictures = pictures
        self._step_graphs = step_graphs
        self._last: _Steady | None = None

    def __call__(self, slots: Sequence[Slot]) -> list[Answer]:
        """Make the next call of pictures of one size and prompt length; their state stays as it is.

        Raises:
            EngineError: an engine fails.
        """
        steady = self._steady(slots)
        common = {
            "sample": torch.cat([slot.sample for slot in slots]).to(self.dtype),
            "timestep": torch.cat([slot.timesteps for slot in slots]),
            "prompt_embeds": steady.prompt_embeds,
        }
        counts = [slot.request.rows for slot in slots]
        ends = itertools.accumulate(counts)
        # With guidance, the conditional row is the last one of a picture.
        read = {slot.number: end - 1 for slot, end in zip(slots, ends, strict=True) if slot.reads}
        taps = self._taps if read else []
        found = self._run(common, steady, ["noise_pred", *taps])
        readings = dict(zip(read, self._read({name: found[name] for name in taps}, list(read.values())), strict=True))
        predicted = torch.split(found["noise_pred"], counts)
        return [Answer(rows, readings.get(slot.number)) for slot, rows in zip(slots, predicted, strict=True)]

    def _run(self, common: dict[str, Tensor], steady: _Steady, wanted: list[str]) -> dict[str, Tensor]:
        if self._step_graphs is None:
            return self._unet(common | self._steer(common, steady), wanted)
        if steady.control and steady.controlled is None:
            return self._step_graphs(common, Deferred(common | steady.control), wanted)
        return self._step_graphs(common | self._steer(common, steady), None, wanted)

    def _steer(self, common: dict[str, Tensor], steady: _Steady) -> dict[str, Tensor]:
        """Return the residuals of all rows; they are zero where no ControlNet steers."""
        if not steady.control:
            return self._none(common["sample"])
        if steady.controlled is None:
            return self._controlnet(common | steady.control)
        found = self._controlnet({name: tensor[steady.controlled] for name, tensor in common.items()} | steady.control)
        zeros = self._none(common["sample"])
        return {name: zeros[name].index_copy_(0, steady.controlled, rows) for name, rows in found.items()}

    def _none(self, sample: Tensor) -> dict[str, Tensor]:
        rows, _, height, width = sample.shape
        names = [spec.name for spec in self._controlnet.outputs]
        return {
            name: sample.new_zeros(rows, channels, height // scale, width // scale)
            for name, (channels, scale) in zip(names, self._residuals, strict=True)
        }

    def _read(self, taps: dict[str, Tensor], rows: list[int]) -> list[Tensor]:
        """Return what the probe reads from these rows."""
        found: list[Tensor] = []
        for start in range(0, len(rows), self._pictures):
            some = rows[start : start + self._pictures]
            # Slices, for a list of indices would be copied to the device.
            inputs = {name: torch.cat([tap[row : row + 1] for row in some]) for name, tap in taps.items()}
            found += torch.split(self._probe(inputs)["reading"], 1) if self._probe else []
        return found

    def _steady(self, slots: Sequence[Slot]) -> _Steady:
        key = tuple((slot.number, slot.scale) for slot in slots)
        if self._last is None or self._last.key != key:
            self._last = None  # before there is another one: control maps are large
            self._last = self._gather(slots, key)
        return self._last

    def _gather(self, slots: Sequence[Slot], key: tuple[tuple[int, float], ...]) -> _Steady:
        def together(tensors: list[Tensor]) -> Tensor:
            return torch.cat(tensors).to(self.device, self.dtype)

        prompt_embeds = together([slot.request.prompt_embeds for slot in slots])
        rows: list[int] = []
        maps: list[Tensor] = []
        scales: list[Tensor] = []
        start = 0
        for slot in slots:
            request, count = slot.request, slot.request.rows
            steered = 0 if slot.scale == 0 else 1 if request.guess_mode else count
            rows += range(start + count - steered, start + count)
            maps.append(request.control_map.expand(steered, -1, -1, -1))
            scales.append(residual_scale(len(self._residuals), slot.scale, request.guess_mode).expand(steered, -1))
            start += count
        if not rows:
            return _Steady(key, prompt_embeds, None, {})
        control = {"control_map": together(maps), "residual_scale": together(scales)}
        controlled = None if len(rows) == start else torch.tensor(rows, device=self.device)
        return _Steady(key, prompt_embeds, controlled, control)
