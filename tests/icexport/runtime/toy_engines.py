"""Engines that predict by a formula, row by row, and count what they are called with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from engines.base import TensorSpec, check_inputs
from icexport.fidelity.monitor import FidelityMonitor
from icexport.graphs.profile import Profile, SizeRange
from icexport.models.probe import ProbeConfig
from icexport.runtime.rows import StepModels
from icexport.runtime.step_engine import StepEngine

FACTOR, TOKENS, FEATURES = 2, 3, 8
RESIDUALS = ((4, 1), (4, 2))
"""Channels of each residual, and cells of the latents for each of its cells."""

PROFILE = Profile(SizeRange(1, 1, 4), SizeRange(16, 16, 32), SizeRange(16, 16, 32))
PROBE = ProbeConfig((4,), time_embed_dim=1)

_F32 = torch.float32
_MAP = ("rows", "columns")
_COMMON = (
    TensorSpec("sample", _F32, ("samples", 4, *_MAP)),
    TensorSpec("timestep", _F32, ("samples",)),
    TensorSpec("prompt_embeds", _F32, ("samples", TOKENS, FEATURES)),
)
_RESIDUAL_SPECS = (
    TensorSpec("down_residual_0", _F32, ("samples", 4, *_MAP)),
    TensorSpec("mid_residual", _F32, ("samples", 4, "half", "half of columns")),
)


class Toy:
    """What they share; see ``engines.Engine``.

    Attributes:
        rows: how many rows each call had.
        error: raised by the next calls.
    """

    backend, device = "toy", torch.device("cpu")

    def __init__(self, name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        self.name, self.inputs, self.outputs = name, inputs, outputs
        self.rows: list[int] = []
        self.error: BaseException | None = None

    def close(self) -> None:
        """Do nothing."""

    def checked(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Return the inputs in their order, and count the rows."""
        if self.error is not None:
            raise self.error
        found = check_inputs(self, inputs)  # type: ignore[arg-type]
        self.rows.append(len(found[0]))
        return found


class ToyControlNet(Toy):
    """Residuals of everything that it gets."""

    def __init__(self) -> None:
        own = (
            TensorSpec("control_map", _F32, ("samples", 3, "height", "width")),
            TensorSpec("residual_scale", _F32, ("samples", len(RESIDUALS))),
        )
        super().__init__("controlnet", (*_COMMON, *own), _RESIDUAL_SPECS)

    def __call__(self, inputs: Mapping[str, Tensor], outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return both residuals."""
        sample, timestep, prompt, control, scale = self.checked(inputs)
        cells = torch.nn.functional.avg_pool2d(control, FACTOR).mean(1, keepdim=True)
        mixed = torch.tanh(0.3 * sample + cells + _each(prompt.mean((1, 2))) - _each(timestep / 1000))
        return {
            "down_residual_0": mixed * _each(scale[:, 0]),
            "mid_residual": torch.nn.functional.avg_pool2d(mixed, 2) * _each(scale[:, 1]),
        }


class ToyUNet(Toy):
    """A prediction of everything that it gets, and a tap that tells the rows apart."""

    def __init__(self) -> None:
        outputs = (
            TensorSpec("noise_pred", _F32, ("samples", 4, *_MAP)),
            TensorSpec("tap_0", _F32, ("samples", 4, *_MAP)),
            TensorSpec("time_embedding", _F32, ("samples", 1)),
        )
        super().__init__("unet", (*_COMMON, *_RESIDUAL_SPECS), outputs)

    def __call__(self, inputs: Mapping[str, Tensor], outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return what is wanted."""
        sample, timestep, prompt, down, mid = self.checked(inputs)
        mid = torch.nn.functional.interpolate(mid, scale_factor=2.0)
        tap = torch.tanh(0.7 * sample + _each(prompt.mean((1, 2))) + 0.5 * down + 0.5 * mid)
        found = {
            "noise_pred": tap + 0.1 * torch.cos(_each(timestep) / 50),
            "tap_0": tap,
            "time_embedding": timestep[:, None] / 1000,
        }
        return {name: found[name] for name in outputs or found}


class ToyProbe(Toy):
    """A reading of the tap and the time."""

    def __init__(self) -> None:
        inputs = (
            TensorSpec("tap_0", _F32, ("pictures", 4, *_MAP)),
            TensorSpec("time_embedding", _F32, ("pictures", 1)),
        )
        super().__init__("probe", inputs, (TensorSpec("reading", _F32, ("pictures", 3, *_MAP)),))

    def __call__(self, inputs: Mapping[str, Tensor], outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return the reading."""
        tap, time = self.checked(inputs)
        return {"reading": torch.tanh(tap[:, :3] + _each(time[:, 0]))}


def _each(values: Tensor) -> Tensor:
    return values[:, None, None, None]


class Toys:
    """A step engine on toys.

    Args:
        profile: sizes.
        **options: further arguments of the step engine.
    """

    def __init__(self, profile: Profile = PROFILE, **options: object) -> None:
        self.controlnet, self.unet, self.probe = ToyControlNet(), ToyUNet(), ToyProbe()
        models = StepModels(self.controlnet, self.unet, self.probe, RESIDUALS, profile.batch.max)
        self.engine = StepEngine(models, profile, FACTOR, **options)  # type: ignore[arg-type]

    def monitor(self, control_map: Tensor, calls: Sequence[int]) -> FidelityMonitor:
        """Return what reads these calls of one picture."""
        return FidelityMonitor(self.probe, PROBE, control_map[None], calls)  # type: ignore[arg-type]
