"""ControlNet training: diffusion loss, reward on the one-step estimate, and alignment through a frozen probe.

L = L_diff + alpha L_reward + beta L_align, as InnerControl (arXiv 2507.02321) has it; the reward is that of
ControlNet++ (arXiv 2404.07987).
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor

from icexport.conditions import Condition
from icexport.errors import UsageError
from icexport.models.probe import InnerControlProbe
from icexport.models.taps import Taps
from training.loop.task import Task
from training.tasks.extractors import RewardExtractor, reward_extractor
from training.tasks.frozen import BaseModels, Frozen, Noised, noised, read, residuals
from training.tasks.losses import LossConfig, alignment_loss, diffusion_loss, predict_original, reward_loss
from training.tasks.validation import Validation


class ControlNetTask(Task):
    """Trains a ControlNet for a frozen base model; the ControlNet is all that is registered.

    Args:
        controlnet: where training starts; trained in place, in float32.
        models: the base model, shared and never changed. Its networks may be of a half type under autocast.
        loss: weights and timestep ranges.
        condition: what the control maps show; extracts those that the data lack.
        probe: reads the control from the UNet's taps; needed where ``loss.beta`` is not 0.
        extractor: reads the control from one-step estimates; by default the condition's.
        text_dropout: probability that a sample's prompt is the empty one.
        validation: draws pictures; None: no validation.

    Raises:
        UsageError: alignment is on without a probe.
        CheckpointError: ControlNet or probe do not fit the base model or the condition.
    """

    name = "controlnet"

    def __init__(
        self,
        controlnet: ControlNetModel,
        models: BaseModels,
        loss: LossConfig,
        *,
        condition: Condition,
        probe: InnerControlProbe | None = None,
        extractor: RewardExtractor | None = None,
        text_dropout: float = 0.0,
        validation: Validation | None = None,
    ) -> None:
        super().__init__()
        if loss.beta and probe is None:
            raise UsageError(f"The alignment loss (beta = {loss.beta}) reads the control with a probe: give one.")
        models.check_fit(condition.name, controlnet, probe if loss.beta else None)
        controlnet.register_to_config(_name_or_path="")  # no folder of this machine in what is saved
        self.controlnet = controlnet.float().train().requires_grad_(True)
        self._loss = loss
        self._condition = condition
        self._text_dropout = text_dropout
        self._validation = validation
        self._extractor = (extractor or reward_extractor(condition, loss.legacy_hed)) if loss.alpha else None
        self._frozen, self._taps = Frozen(models), None
        if loss.beta and probe is not None:
            self._frozen, self._taps = Frozen(models, probe=probe.float()), Taps(models.unet, probe.config.tap_kind)

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """Return ``loss`` of one batch, and those of its parts that are on: ``diffusion``, ``reward``, ``alignment``.

        Raises:
            UnsupportedOptionError: alignment is on with gradient checkpointing in the UNet.
        """
        frozen, models, loss = self._frozen, self._frozen.models, self._loss
        frozen.to(self.device)
        sample = noised(batch, models, self._condition, generator, self._text_dropout)
        added = residuals(self.controlnet, sample, sample.control)
        recording: AbstractContextManager[list[Tensor]] = self._taps.record() if self._taps else nullcontext([])
        with recording as taps:
            output = models.unet(sample.noisy, sample.timesteps, sample.text, return_dict=False, **added)[0]
        diffusion = diffusion_loss(output, sample.noise, sample.latents, sample.timesteps, models.scheduler)
        total, parts = diffusion, {"diffusion": diffusion.detach()}
        if self._extractor is not None:
            reward = self._reward(sample, output, self._extractor)
            total, parts["reward"] = total + loss.alpha * reward, reward.detach()
        if frozen.probe is not None:
            config = frozen.probe.config
            reading = read(frozen.probe, models, taps, sample.timesteps)
            alignment = alignment_loss(
                reading,
                sample.control,
                sample.timesteps,
                loss.alignment_range,
                config.control_range,
                config.normaliser,
            )
            total, parts["alignment"] = total + loss.beta * alignment, alignment.detach()
        return {"loss": total, **parts}

    def _reward(self, sample: Noised, output: Tensor, extractor: RewardExtractor) -> Tensor:
        models = self._frozen.models
        scheduler, timesteps = models.scheduler, sample.timesteps
        kind = scheduler.config["prediction_type"]
        original = predict_original(sample.noisy, output, timesteps, scheduler.alphas_cumprod, kind)
        target = extractor.target(sample.control, sample.pixels)
        limits, skip = self._loss.reward_range, extractor.blank(target)
        return reward_loss(original, target, timesteps, limits, models.decode, extractor, skip)

    def settings(self) -> dict[str, Any]:
        """Return losses, condition, prompts and frozen weights."""
        condition = {"name": self._condition.name, **asdict(self._condition)}
        values = {"loss": asdict(self._loss), "condition": condition, "text_dropout": self._text_dropout}
        return json.loads(json.dumps({**values, "frozen": self._frozen.fingerprints()}, default=str))

    def save(self, folder: Path) -> None:
        """Write the ControlNet as a diffusers folder."""
        self.controlnet.save_pretrained(folder)

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Draw the fixed prompts and maps as ``folder/pictures.png``; how well the pictures follow their maps."""
        if self._validation is None:
            return {}
        self._frozen.to(self.device)
        return self._validation(self.controlnet, folder)
