"""Probe training: the small network that reads the control map back from the UNet's features.

The recipe follows Readout Guidance's spatial heads with four changes: a timestep for every sample instead of one a
batch, the embedding of the true timestep, range (-1, 1), and half of the batches with the ControlNet attached, since
that is how the probe is used (arXiv 2507.02321; google-research/readout_guidance, readout_training/train_spatial.py).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor

from icexport import conditions
from icexport.conditions import Condition
from icexport.models.probe import InnerControlProbe, ProbeConfig
from icexport.models.taps import TapKind, Taps
from training.loop.task import Task
from training.tasks.frozen import BaseModels, Frozen, noised, probe_target, read, residuals
from training.tasks.losses import balanced_mse

BINS = 10
"""Parts of the noise schedule whose losses are reported apart."""

OFFICIAL_PROJECTION = 384


def new_probe(
    unet: UNet2DConditionModel, tap_kind: TapKind = "attn", condition: str | None = None, **sizes: Any
) -> InnerControlProbe:
    """Return an untrained probe for ``unet``.

    Sizes are the official ones, P = 384 in 32 groups, where the widest tap has more than 704 channels. Below that P is
    half of its width, rounded up to a multiple of 32, with 8 channels of P a group. The head's widths are P / 3 and
    P / 12, as in the official network.

    Args:
        unet: UNet whose taps it will read.
        tap_kind: kind of the taps that it reads.
        condition: name of what it will read there, which says how readings and control maps are compared.
        **sizes: any field of ``ProbeConfig``, in place of the above.

    Raises:
        UsageError: the UNet has no such taps, or fields do not fit together.
    """
    dims = Taps(unet, tap_kind).dims
    projection = min(OFFICIAL_PROJECTION, 32 * -(-max(dims) // 64))
    values: dict[str, Any] = {
        "dims": dims,
        "projection_dim": projection,
        "head_dims": (projection // 3, projection // 12),
        "time_embed_dim": unet.time_embedding.linear_2.out_features,
        "tap_kind": tap_kind,
        "condition": condition,
        "normaliser": "identity" if condition is None else conditions.get(condition).probe_normaliser,
        **sizes,
    }
    width = values["projection_dim"]
    values.setdefault("num_groups", 32 if width == OFFICIAL_PROJECTION else max(1, width // 8))
    return InnerControlProbe(ProbeConfig(**values))


class ProbeTask(Task):
    """Trains a probe on the features of frozen networks; the probe is all that is registered.

    Args:
        probe: where training starts; trained in place, in float32. Its config says which taps it reads, with which
            timestep embedding, and in which range.
        models: the base model, shared and never changed.
        condition: what the control maps show; extracts those that the data lack.
        controlnet: runs before the UNet in a part of the batches; None: the plain UNet always.
        control_share: share of the batches in which the ControlNet runs.
        balanced: whether to weigh background and the rest alike (Readout Guidance, for sparse edges), instead of plain
            MSE.
        text_dropout: probability that a sample's prompt is the empty one.

    Raises:
        CheckpointError: ControlNet or probe do not fit the base model or the condition.
    """

    name = "probe"

    def __init__(
        self,
        probe: InnerControlProbe,
        models: BaseModels,
        *,
        condition: Condition,
        controlnet: ControlNetModel | None = None,
        control_share: float = 0.5,
        balanced: bool = False,
        text_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        models.check_fit(condition.name, controlnet, probe)
        self.probe = probe.float().train().requires_grad_(True)
        if probe.config.time_embed_dim is None:  # official files can hold time layers that never run
            for name, parameter in self.probe.named_parameters():
                parameter.requires_grad_(".time." not in name)
        self._frozen = Frozen(models, controlnet=controlnet)
        self._taps = Taps(models.unet, probe.config.tap_kind)
        self._condition = condition
        self._control_share = control_share if controlnet else 0.0
        self._balanced = balanced
        self._text_dropout = text_dropout

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """Return ``loss``, and the mean squared error of the batch's samples in each timestep bin, as ``t000-099``."""
        frozen, models, probe = self._frozen, self._frozen.models, self.probe
        frozen.to(self.device)
        attached = float(torch.rand((), generator=generator)) < self._control_share
        sample = noised(batch, models, self._condition, generator, self._text_dropout)
        with torch.no_grad():
            added = residuals(frozen.controlnet, sample, sample.control) if frozen.controlnet and attached else {}
            with self._taps.record() as taps:
                models.unet(sample.noisy, sample.timesteps, sample.text, return_dict=False, **added)
        reading = read(probe, models, taps, sample.timesteps)
        target = probe_target(probe, sample.control, reading.shape[-2:])
        errors = (reading - target).square().mean((1, 2, 3))
        loss = balanced_mse(reading, target, probe.config.control_range[0]) if self._balanced else errors.mean()
        return {"loss": loss, **_by_bin(errors.detach(), sample.host_timesteps, models.steps)}

    def settings(self) -> dict[str, Any]:
        """Return the probe's config, how it is trained, and frozen weights."""
        values = {
            "probe": self.probe.config.to_dict(),
            "condition": {"name": self._condition.name, **asdict(self._condition)},
            "control_share": self._control_share,
            "balanced": self._balanced,
            "text_dropout": self._text_dropout,
            "frozen": self._frozen.fingerprints(),
        }
        return json.loads(json.dumps(values, default=str))

    def save(self, folder: Path) -> None:
        """Write the probe's folder."""
        self.probe.save_pretrained(folder)


def _by_bin(errors: Tensor, timesteps: Tensor, steps: int) -> dict[str, Tensor]:
    """Average ``errors`` ``[B]`` for each tenth of the schedule that ``timesteps`` ``[B]``, on the CPU, fall into."""
    bins = timesteps * BINS // steps
    present = bins.unique()
    # One product with weights made on the CPU: picking samples out on a GPU would wait for it, once a bin.
    weights = (bins == present[:, None]).float()
    means = (errors * (weights / weights.sum(1, keepdim=True)).to(errors.device)).sum(1)
    limits = [(index * steps // BINS, (index + 1) * steps // BINS - 1) for index in present.tolist()]
    return {f"t{first:03d}-{last:03d}": mean for (first, last), mean in zip(limits, means, strict=True)}
