"""The stages of the reference model: autoencoder, denoiser, depth network, ControlNets and probes."""

from __future__ import annotations

import copy
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel, UniPCMultistepScheduler
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import CLIPTextModel

from icexport import conditions
from icexport.models import loading
from icexport.models.probe import InnerControlProbe
from training.data import icons, scenes
from training.data.drawn import Draw, DrawnBatches
from training.loop.log import underway
from training.loop.trainer import Task, TrainerConfig
from training.loop.trainer import train as fit
from training.reference import autoencoder, denoiser, pictures
from training.reference.depth import Estimator, image_processor, new_estimator
from training.reference.layout import save_text_encoder, save_tokenizer
from training.reference.tokenizer import clip_tokenizer
from training.tasks.controlnet import ControlNetTask
from training.tasks.frozen import BaseModels
from training.tasks.judge import ReadingTask, draw_pictures
from training.tasks.losses import LossConfig
from training.tasks.probe import ProbeTask, new_probe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

logger = logging.getLogger(__name__)

MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
"""Makes the folder loadable as a diffusers pipeline."""

RECIPE = Path(__file__).parents[1] / "recipes" / "reference.toml"

SCENES = 8000

HED_PICTURES = 9000
"""Of how many pictures HED maps are made: the network takes most of the time that preparing takes."""

TEXT_DROPOUT = 0.3
"""Higher than the denoiser's: an empty prompt makes the ControlNet rely on the control map alone."""

PROBE_SIZES: dict[str, Any] = {"projection_dim": 64, "num_groups": 8, "head_dims": (24, 8), "output_scale": 2}
"""A small probe whose reading has half of the pictures' resolution."""


def stages(recipe: Path) -> dict[str, TrainerConfig]:
    """Return the stage settings of a recipe file, by the stage's name.

    Raises:
        TypeError, ValueError: the file is no recipe.
    """
    tables = tomllib.loads(recipe.read_text(encoding="utf-8"))
    common = tables.pop("common", {})
    return {name: TrainerConfig(**{**common, **values}) for name, values in tables.items()}


@dataclass(frozen=True)
class Stages:
    """Runs stages, each in a folder of its own in ``work``; what is finished is not run again."""

    settings: dict[str, TrainerConfig]
    work: Path

    def run(self, name: str, task: Callable[[], Task], draw: Callable[[int], Draw]) -> Path:
        """Train a stage and return the folder of its result: averaged weights.

        Args:
            name: name of the stage.
            task: makes the task; called after seeding.
            draw: takes the number of pictures of one process to how a batch is drawn.
        """
        state, config = PartialState(), self.settings[name]
        config = replace(config, batch_size=config.batch_size // state.num_processes)
        finished = [path for path in (self.work / name).glob("*/") if not path.name.endswith(("-live", "checkpoints"))]
        if finished:
            return finished[0]
        torch.manual_seed(config.seed)
        made = task()
        fit(made, DrawnBatches(draw(config.batch_size), config.seed, state.process_index), config, self.work / name)
        state.wait_for_everyone()
        return self.work / name / made.name


def train(work: Path, output: Path, recipe: Path, bpe_file: Path, hed_weights: Path | None = None) -> None:
    """Run every stage of ``recipe`` in ``work`` and write the finished model to ``output``."""
    state, run = PartialState(), Stages(stages(recipe), work).run
    logger.setLevel(logging.INFO if state.is_main_process else logging.WARNING)
    with underway(logger, "Icons and scenes"), state.main_process_first():
        found = icons.prepare(work / "data")
        shown = scenes.prepare(work / "data", SCENES)
    drawn = found.subset(~found.held_out)
    images = torch.from_numpy(drawn.images).permute(0, 3, 1, 2).contiguous()
    rooms = torch.from_numpy(shown.images).permute(0, 3, 1, 2).contiguous()
    tokens = clip_tokenizer(bpe_file)

    vae = _autoencoder(run, "vae", autoencoder.new_vae, images)
    with underway(logger, "Latents and captions of the icons"):
        data = pictures.prepare(work / "icons.safetensors", lambda: pictures.build(drawn, vae, tokens, 0))
    unet, text_encoder = _denoiser(run, "unet", lambda: (denoiser.new_unet(), denoiser.new_text_encoder(tokens)), data)
    models = BaseModels(unet, vae, text_encoder, tokens, denoiser.noise_scheduler())
    canny = conditions.get("canny")
    with underway(logger, "Control maps: canny"):
        edges = pictures.control_maps(data.images, canny)
    controlnet = _controlnet(run, "controlnet", new_controlnet(unet), models, canny, data, edges)

    # What the stages above made goes on with scenes among its pictures.
    vae = _autoencoder(run, "vae-scenes", lambda: vae, torch.cat((images, rooms)))
    with underway(logger, "Latents and captions of icons and scenes"):
        data = pictures.prepare(work / "all.safetensors", lambda: pictures.build(drawn, vae, tokens, 0, shown))
    unet, text_encoder = _denoiser(run, "unet-scenes", lambda: (unet, text_encoder), data)
    models = BaseModels(unet, vae, text_encoder, tokens, denoiser.noise_scheduler())
    estimator = _estimator(run, models, rooms, torch.from_numpy(shown.depth))
    if state.is_main_process:
        save_base(models, estimator, output)

    start = controlnet
    for name in ("canny", "hed", "lineart", "depth"):
        options = {"weights": hed_weights} if name == "hed" else {}
        condition = conditions.get(name, **options)
        with underway(logger, f"Control maps: {name}, icons and scenes"), state.main_process_first():
            index, maps = _maps(work / f"maps-{name}.safetensors", condition, data, shown)
        chosen = data.subset(index)
        controlnet = _controlnet(run, f"controlnet-{name}", start, models, condition, chosen, maps)
        start = controlnet if name == "canny" else start
        probe = _probe(run, f"probe-{name}", models, condition, controlnet, chosen, maps)
        if state.is_main_process:
            save_control(name, controlnet, probe, output)


def new_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """Start a ControlNet as a copy of the UNet's encoder; its embedding strides twice, as the autoencoder."""
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(24, 48, 96))


def save_base(models: BaseModels, estimator: Estimator, output: Path) -> None:
    """Write everything but ControlNets and probes, in float16."""
    for name, module in {"vae": models.vae, "unet": models.unet}.items():
        _halved(module).save_pretrained(output / name)
    save_text_encoder(_halved(models.text_encoder), output / "text_encoder")
    _halved(estimator.model).save_pretrained(output / "depth-estimator")
    image_processor().save_pretrained(output / "depth-estimator")
    for name in ("vae", "unet", "text_encoder", "depth-estimator"):
        _tidy(output / name)
    save_tokenizer(models.tokenizer, output / "tokenizer")
    UniPCMultistepScheduler.from_config(models.scheduler.config).save_pretrained(output / "scheduler")
    (output / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")


def save_control(condition: str, controlnet: ControlNetModel, probe: InnerControlProbe, output: Path) -> None:
    """Write a ControlNet and its probe, in float16."""
    _halved(controlnet).save_pretrained(output / f"controlnet-{condition}")
    _tidy(output / f"controlnet-{condition}")
    _halved(probe).save_pretrained(output / f"probe-{condition}")


def _autoencoder(run: Any, name: str, start: Callable[[], AutoencoderKL], images: torch.Tensor) -> AutoencoderKL:
    maps = torch.zeros(len(images), 1, 1, dtype=torch.uint8)  # an autoencoder has no use for them
    folder = run(
        name, lambda: autoencoder.AutoencoderTask(start(), name), lambda size: draw_pictures(images, maps, size)
    )
    vae = loading.load_vae(folder, torch.float32).requires_grad_(False)
    autoencoder.normalise_latents(vae, images[:: max(1, len(images) // 1024)])
    return vae


def _denoiser(
    run: Any, name: str, start: Callable[[], tuple[UNet2DConditionModel, CLIPTextModel]], data: pictures.DiffusionSet
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    folder = run(name, lambda: denoiser.DenoiserTask(*start(), data.empty_tokens.long(), name), data.draw)
    return (
        loading.load_unet(folder / "unet", torch.float32).requires_grad_(False),
        loading.load_text_encoder(folder / "text_encoder", torch.float32).requires_grad_(False),
    )


def _estimator(run: Any, models: BaseModels, images: torch.Tensor, depth: torch.Tensor) -> Estimator:
    """Return the depth network, trained on scenes, and on scenes as the autoencoder gives them."""

    @torch.no_grad()
    def draw(size: int) -> Draw:
        latents = autoencoder.encode(models.vae, images[:3000])
        decoded = torch.cat([(255 * models.decode(chunk)).round().byte() for chunk in latents.split(64)])
        return draw_pictures(torch.cat((images, decoded)), torch.cat((depth, depth[:3000])), size)

    folder = run(
        "depth-estimator", lambda: ReadingTask(Estimator(new_estimator()), "depth-estimator", F.l1_loss), draw
    )
    estimator = Estimator(new_estimator())
    estimator.load_state_dict(load_file(folder / "model.safetensors"))
    return estimator.eval().requires_grad_(False)


def _maps(
    cache: Path, condition: conditions.Condition, data: pictures.DiffusionSet, shown: scenes.SceneSet
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which pictures a ControlNet is trained on (int ``[M]``) and their control maps uint8 ``[M,H,W]``."""
    if condition.name == "depth":
        depth = torch.from_numpy(shown.depth)
        maps = torch.stack((depth, depth.flip(-1)), 1).flatten(0, 1)  # as the mirrored pictures lie in `data`
        return torch.arange(len(data) - len(maps), len(data)), maps
    if not cache.exists():
        index = torch.arange(len(data))
        if condition.name == "hed":
            index = torch.randperm(len(data), generator=torch.Generator().manual_seed(7))[:HED_PICTURES].sort().values
        save_file({"index": index, "maps": pictures.control_maps(data.images[index], condition)}, cache)
    stored = load_file(cache)
    drawn = stored["maps"].float().mean((1, 2)) > 0.02 * 255  # a nearly blank map teaches nothing
    return stored["index"][drawn], stored["maps"][drawn]


def _controlnet(
    run: Any,
    name: str,
    start: ControlNetModel,
    models: BaseModels,
    condition: conditions.Condition,
    data: pictures.DiffusionSet,
    maps: torch.Tensor,
) -> ControlNetModel:
    def task() -> Task:
        return ControlNetTask(start, models, LossConfig(), condition=condition, text_dropout=TEXT_DROPOUT)

    trained: ControlNetModel = ControlNetModel.from_pretrained(run(name, task, lambda size: data.draw(size, maps)))
    return trained.requires_grad_(False)


def _probe(
    run: Any,
    name: str,
    models: BaseModels,
    condition: conditions.Condition,
    controlnet: ControlNetModel,
    data: pictures.DiffusionSet,
    maps: torch.Tensor,
) -> InnerControlProbe:
    def task() -> Task:
        probe = new_probe(models.unet, "attn", condition.name, **PROBE_SIZES)
        return ProbeTask(probe, models, condition=condition, controlnet=controlnet, text_dropout=TEXT_DROPOUT)

    return InnerControlProbe.from_pretrained(run(name, task, lambda size: data.draw(size, maps)))


def _halved(module: Any) -> Any:
    """Return a float16 copy."""
    return copy.deepcopy(module).half()


def _tidy(folder: Path) -> None:
    """Take what is of this machine or run out of a ``config.json``."""
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values.pop("_name_or_path", None)
    if "dtype" in values:
        # transformers loads in the dtype that the config names, diffusers in float32: let a pipeline be of one dtype.
        values["dtype"] = "float32"
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
