"""What all arms of one condition share: data, base model, the ControlNet that they start from, probes and judge."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from icexport import conditions
from icexport.conditions import Condition
from icexport.host.files import whole
from icexport.models.probe import InnerControlProbe
from icexport.reference import reference_path
from training.data.drawn import Draw, DrawnBatches
from training.data.scenes import HELD_OUT, SceneSet, prepare, render_many
from training.experiment.recipe import ProbeKind, Recipe
from training.loop.trainer import Task, TrainerConfig, train
from training.reference.stages import PROBE_SIZES
from training.tasks.controlnet import ControlNetTask
from training.tasks.frozen import BaseModels, load_base, new_controlnet
from training.tasks.judge import Judge, ReadingTask, draw_pictures
from training.tasks.losses import LossConfig
from training.tasks.probe import ProbeTask, new_probe

PROBE_SEEDS: dict[ProbeKind, int] = {"attn": 0, "conv": 0, "plain": 0, "random": 0, "held-out": 1}


@dataclass(frozen=True)
class Pictures:
    """Scenes with their control maps.

    Attributes:
        pixels: pictures, uint8 ``[N,3,H,W]``.
        maps: control maps, uint8 ``[N,H,W]``.
        captions: one caption for each picture.
        latents: scaled latents, float32 ``[N,4,h,w]``.
    """

    pixels: Tensor
    maps: Tensor
    captions: list[str]
    latents: Tensor


class Setting:
    """Everything about one condition that arms share; made on first use and kept in ``work``.

    Args:
        recipe: recipe of the experiment.
        name: name of the condition.
        work: folder of the experiment.
    """

    def __init__(self, recipe: Recipe, name: str, work: Path) -> None:
        self.recipe, self.name = recipe, name
        self.work = work / name
        self._shared = work

    @functools.cached_property
    def condition(self) -> Condition:
        """The condition; its depth network is the one that rewards, never the one that judges."""
        options = {"model": str(reference_path() / "depth-estimator")} if self.name == "depth" else {}
        return conditions.get(self.name, **options)

    @functools.cached_property
    def models(self) -> BaseModels:
        """The embedded base model."""
        return load_base("reference")

    @functools.cached_property
    def training(self) -> Pictures:
        """What every network is trained on."""
        return self._pictures("training", prepare(self._shared / "data", self.recipe.scenes))

    @functools.cached_property
    def held_out(self) -> Pictures:
        """What every arm is judged on; no network has seen it."""
        return self._pictures("held-out", render_many(range(HELD_OUT, HELD_OUT + self.recipe.held_out)))

    def batches(self, batch_size: int, seed: int) -> DrawnBatches:
        """Return batches of `training` with ready latents; the same for every arm of a seed."""
        return DrawnBatches(self._draw(batch_size), seed)

    def fork(self) -> ControlNetModel:
        """Return the under-trained ControlNet, a fresh copy."""
        folder = self.work / "fork"
        if not (folder / "controlnet").exists():
            torch.manual_seed(0)
            start = new_controlnet(self.models)
            task = ControlNetTask(
                start, self.models, LossConfig(), condition=self.condition, text_dropout=self.recipe.text_dropout
            )
            self._train(task, self.recipe.fork, folder)
        loaded: ControlNetModel = ControlNetModel.from_pretrained(folder / "controlnet")
        return loaded

    def probe(self, kind: ProbeKind) -> InnerControlProbe:
        """Return one of the probes, trained if it is not there yet."""
        folder = self.work / f"probe-{kind}"
        torch.manual_seed(PROBE_SEEDS[kind])
        probe = new_probe(self.models.unet, "conv" if kind == "conv" else "attn", self.name, **PROBE_SIZES)
        if kind == "random":
            return probe.eval()
        if not (folder / "probe").exists():
            task = ProbeTask(
                probe,
                self.models,
                condition=self.condition,
                controlnet=None if kind == "plain" else self.fork(),
                text_dropout=self.recipe.text_dropout,
            )
            self._train(task, self.recipe.probe, folder, PROBE_SEEDS[kind])
        return InnerControlProbe.from_pretrained(folder / "probe").eval()

    def judge(self) -> Judge:
        """Return the network that reads control maps from finished pictures, trained if it is not there yet."""
        folder = self.work / "judge"
        if not (folder / "judge").exists():
            torch.manual_seed(1)
            pictures = torch.cat((self.training.pixels, self._decoded(self.training.latents[::2])))
            maps = torch.cat((self.training.maps, self.training.maps[::2]))
            draw = draw_pictures(pictures, maps, self.recipe.judge.batch_size)
            train(
                ReadingTask(Judge(), error=F.l1_loss if self.name == "depth" else F.mse_loss),
                DrawnBatches(draw, seed=1),
                self.recipe.judge,
                folder,
            )
        return Judge.load(folder / "judge" / "model.safetensors")

    def _pictures(self, name: str, scenes: SceneSet) -> Pictures:
        """Return control maps and latents of ``scenes``, which every run would otherwise compute again."""
        pixels = torch.from_numpy(scenes.images).permute(0, 3, 1, 2).contiguous()
        cache = self.work / f"{name}-{len(pixels)}.safetensors"
        if cache.exists():
            return Pictures(pixels, captions=scenes.captions, **load_file(cache))
        chunks = pixels.split(64)
        if self.name == "depth":
            maps = torch.from_numpy(scenes.depth)
        else:
            extracted = [self.condition.extract_batch(chunk.float() / 255)[:, 0] for chunk in chunks]
            maps = (255 * torch.cat(extracted)).round().byte()
        latents = torch.cat([self.models.encode(chunk.float() / 255, None) for chunk in chunks])
        cache.parent.mkdir(parents=True, exist_ok=True)
        with whole(cache) as partial:  # several runs may be at it at once
            save_file({"maps": maps.contiguous(), "latents": latents}, partial)
        return Pictures(pixels, captions=scenes.captions, maps=maps, latents=latents)

    @torch.no_grad()
    def _decoded(self, latents: Tensor) -> Tensor:
        """Return pictures as the autoencoder gives them, uint8: what a judge will see."""
        return torch.cat([(255 * self.models.decode(chunk)).round().byte() for chunk in latents.split(64)])

    def _draw(self, batch_size: int) -> Draw:
        data = self.training
        tokens = self.models.tokenize(data.captions)

        def draw(generator: torch.Generator) -> dict[str, Any]:
            index = torch.randint(len(data.captions), (batch_size,), generator=generator)
            return {
                "pixels": data.pixels[index].float() / 255,
                "latents": data.latents[index],
                "control": (data.maps[index].float() / 255)[:, None].expand(-1, 3, -1, -1),
                "input_ids": tokens[index],
                "ids": [f"scene {i}" for i in index.tolist()],
            }

        return draw

    def _train(self, task: Task, config: TrainerConfig, folder: Path, seed: int = 0) -> None:
        train(task, self.batches(config.batch_size, seed), config, folder)
