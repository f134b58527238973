"""Validation pictures: the same few prompts and control maps, drawn again and again while a ControlNet trains."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor

from icexport.conditions import Condition
from icexport.errors import ConditionError, UsageError
from icexport.graphs.profile import SizeRange
from icexport.host.pictures import to_image
from icexport.host.pixels import to_pixels
from icexport.runtime.drawing import Request, draw
from icexport.runtime.eager import eager_pipeline
from icexport.runtime.schedulers import choose_scheduler
from training.data.config import DataConfig
from training.data.records import records
from training.tasks.frozen import BaseModels, control_maps

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidationConfig:
    """What is drawn; how often, the trainer's ``validate_every`` says.

    Attributes:
        data: where prompts and control maps come from, as the training data's ``source``; None: the training data.
        count: how many pictures are drawn, for the first prompts.
        steps: number of sampling steps (UniPC).
        guidance: classifier-free guidance scale.
        seed: seed of the first picture; each further one has the next.

    Raises:
        UsageError: a value is out of range; all faults are listed.
    """

    data: str | None = None
    count: int = 4
    steps: int = 20
    guidance: float = 7.5
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        limits = {"count": 1, "steps": 1, "guidance": 0, "seed": 0}
        if faults := [
            f"{name} is {getattr(self, name)}, expected {low} or more"
            for name, low in limits.items()
            if getattr(self, name) < low
        ]:
            raise UsageError(f"Validation: {'; '.join(faults)}.")


def first_pictures(data: DataConfig, models: BaseModels, condition: Condition, count: int) -> dict[str, Any]:
    """Return the first ``count`` good pictures of a data set in one batch, with control maps and ``captions``.

    Raises:
        UsageError: there is no good picture, or the data set cannot be opened.
    """
    found = list(itertools.islice(records(data), count))
    batch: dict[str, Any] = {
        "pixels": torch.cat([to_pixels(record.image) for record in found]),
        "input_ids": models.tokenize([record.caption for record in found]),
        "ids": [record.id for record in found],
        "captions": [record.caption for record in found],
    }
    if controls := [to_pixels(record.control) for record in found if record.control is not None]:
        batch["control"] = torch.cat(controls)
    return batch | {"control": control_maps(batch, condition, torch.device("cpu"))}


class Validation:
    """Draws and scores a few pictures with diffusers' own pipeline.

    Args:
        models: the base model.
        condition: scores the pictures.
        batch: ``captions`` and ``control`` of what to draw.
        config: how to draw.
    """

    def __init__(
        self, models: BaseModels, condition: Condition, batch: dict[str, Any], config: ValidationConfig
    ) -> None:
        self._models = models
        self._condition = condition
        self._prompts: list[str] = batch["captions"]
        self._control: Tensor = batch["control"]
        self._config = config
        self._scores = True

    def __call__(self, controlnet: ControlNetModel, folder: Path) -> dict[str, float]:
        """Write ``folder/pictures.png``, a row of control map and picture for each prompt.

        Random numbers come from generators of their own.

        Returns:
            ``score``: mean of the condition's metric; nothing where its extractor has no weights here.
        """
        pictures = self._draw(controlnet)
        rows = [torch.cat(pair, 2) for pair in zip(self._control, pictures, strict=True)]
        to_image(torch.cat(rows, 1)).save(folder / "pictures.png")
        if not self._scores:
            return {}
        try:
            return {"score": float(self._condition.score(pictures, self._control).mean())}
        except ConditionError as error:
            self._scores = False
            logger.warning("Validation pictures are not scored: %s", error)
            return {}

    def _draw(self, controlnet: ControlNetModel) -> Tensor:
        """Return pictures float32 ``[n,3,H,W]`` in [0,1] on the CPU."""
        models, config = self._models, self._config
        pipe = eager_pipeline(
            unet=models.unet,
            vae=models.vae,
            text_encoder=models.text_encoder,
            tokenizer=models.tokenizer,
            controlnet=controlnet,
            scheduler=choose_scheduler("unipc", models.scheduler),
        )
        request = Request(
            self._prompts,
            range(config.seed, config.seed + len(self._prompts)),
            steps=config.steps,
            guidance_scale=config.guidance,
        )
        # One by one: memory has to hold the training's state, too.
        return draw(pipe, self._control, request, calls=SizeRange(1, 1, 1)).pictures
