"""Drawing the pictures that are judged: any number of times the same, resumable, a file at a time."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from PIL import Image

from icexport.bundle.store import Bundle
from icexport.errors import UsageError
from icexport.graphs.profile import SizeRange
from icexport.host.files import write_whole
from icexport.host.pictures import save_png, to_image
from icexport.host.pixels import to_pixels
from icexport.models.precision import precision
from icexport.models.source import ModelSource
from icexport.progress import Progress
from icexport.runtime.drawing import Request, draw
from icexport.runtime.eager import load_eager
from icexport.runtime.pipeline import InnerControlPipeline
from icexport.runtime.schedulers import choose_scheduler, load_scheduler

SETTINGS = "settings.json"
ANY_NUMBER = SizeRange(1, 1, 1 << 30)
"""Pictures in one call of diffusers' own pipeline."""
PAPER_NEGATIVE_PROMPT = "worst quality, low quality"


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn; the defaults are the paper's.

    Attributes:
        steps: number of steps of the scheduler.
        guidance_scale: weight of the prompt; 1: no guidance.
        negative_prompt: what to avoid.
        scheduler: ``unipc``, or a name of diffusers (``DDIM`` ...).
        seed: seed of all pictures together.
    """

    steps: int = 20
    guidance_scale: float = 7.5
    negative_prompt: str = PAPER_NEGATIVE_PROMPT
    scheduler: str = "unipc"
    seed: int = 42


@dataclass(frozen=True)
class Item:
    """One condition to draw: what is needed of it, without its pixels.

    id: name of the condition, unique in the set.
        id: unique in the set.
        caption: the prompt.
        control: file of the control map, at the size of the pictures.
        digest: SHA-256 of the control map's pixels.
    """

    id: str
    caption: str
    control: Path
    digest: str


@dataclass(frozen=True)
class Sampler:
    """A pipeline that draws, and what it is.

    Attributes:
        pipe: diffusers' ControlNet pipeline or one that is called like it.
        source: what was loaded, in words for people.
        key: hash of the weights; samplers of equal key, dtype and sampling draw the same.
        size: (height, width) in pixels.
        calls: numbers of pictures that one call takes.
    """

    pipe: Any
    source: dict[str, Any]
    key: str
    size: tuple[int, int]
    calls: SizeRange = ANY_NUMBER

    def draw(
        self, captions: list[str], controls: torch.Tensor, seeds: list[int], sampling: Sampling, scale: float
    ) -> list[Image.Image]:
        """Return one picture for each caption, control map ``[N,3,H,W]`` in [0,1] and seed."""
        request = Request(
            captions,
            seeds,
            negative_prompt=sampling.negative_prompt,
            steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            controlnet_scale=scale,
        )
        drawn = draw(self.pipe, controls.to(self.pipe.device), request, calls=self.calls)
        return [to_image(picture) for picture in drawn.pictures]


def load_model(
    condition: str,
    model: str,
    controlnet: str | None,
    sampling: Sampling,
    dtype: str = "fp32",
    device: str | None = None,
    size: tuple[int, int] | None = None,
) -> Sampler:
    """Return diffusers' own pipeline on a base model and a ControlNet, loaded strictly and from safetensors.

    Args:
        condition: name of the condition, which names the ControlNet's folder where ``controlnet`` is None.
        model: ``reference``, a folder or a Hub id.
        controlnet: a folder or a Hub id.
        sampling: settings of the pictures; the scheduler is checked here.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        device: device to draw on; None: the CPU.
        size: (height, width) in pixels; None: the model's own.

    Raises:
        UsageError: the scheduler is unknown, or there is no ControlNet for the condition.
        CheckpointError: weights are missing or damaged.
    """
    source = ModelSource.find(condition, model, controlnet, "none")
    own = load_scheduler(source.base.folders["scheduler"], source.config("scheduler")["_class_name"])
    scheduler = choose_scheduler(sampling.scheduler, own)
    pipe = load_eager(source, precision(dtype).torch, scheduler, device or "cpu")
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    given = {"model": model, "controlnet": controlnet, "dtype": dtype}
    key = hashlib.sha256(json.dumps(source.files, sort_keys=True).encode()).hexdigest()
    return Sampler(pipe, given, key, size or (side, side))


def load_bundle(
    path: Path,
    sampling: Sampling,
    backend: str = "auto",
    device: str | None = None,
    size: tuple[int, int] | None = None,
) -> Sampler:
    """Return a bundle's pipeline. Arguments and errors as `load_model`'s and those of `InnerControlPipeline`."""
    bundle = Bundle(path)
    pipe = InnerControlPipeline.from_pretrained(bundle, backend=backend, device=device)
    pipe.scheduler = choose_scheduler(sampling.scheduler, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    profile = bundle.manifest.profile
    source = {"bundle": str(path), "backend": pipe.backend, "dtype": bundle.manifest.dtype}
    usual = profile.height.opt, profile.width.opt
    return Sampler(pipe, source, bundle.manifest.key, size or usual, profile.batch)


def picture_seed(seed: int, condition_id: str, group: int) -> int:
    """Return the seed of one picture, a function of its arguments alone: 63 bits of a hash."""
    text = json.dumps([seed, condition_id, group], ensure_ascii=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def picture_path(folder: Path, condition_id: str, group: int) -> Path:
    """Return ``<id>-<group>.png`` in ``folder``."""
    return folder / file_name(f"{condition_id}-{group}")


def file_name(name: str) -> str:
    """Return ``<name>.png``; what a file name cannot hold is written as in URLs (``/`` as ``%2F``)."""
    return f"{quote(name, safe=' ()[]+,=@')}.png"


def claim(output: Path, settings: dict[str, Any]) -> None:
    """Note what the pictures in ``output`` are drawn with, or check that those there were drawn with the same.

    Raises:
        UsageError: they were drawn with other settings; every difference is listed.
    """
    path = output / SETTINGS
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        output.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(settings, indent=2) + "\n")
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}). Name another --output, or delete that folder.") from error
    wrong = [
        f"{name} was {before.get(name)!r} and is {settings.get(name)!r}"
        for name in sorted(before.keys() | settings.keys())
        if before.get(name) != settings.get(name)
    ]
    if wrong:
        raise UsageError(
            f"{output} holds pictures that were drawn otherwise: {'; '.join(wrong)}. Name another --output, or delete "
            "that folder."
        )


def draw_missing(
    sampler: Sampler,
    sampling: Sampling,
    items: Sequence[Item],
    groups: int,
    folder: Path,
    *,
    scale: float = 1.0,
    batch_size: int = 4,
    progress: Progress,
) -> int:
    """Draw every picture that ``folder`` lacks; each appears complete or not at all.

    Args:
        sampler: draws the pictures.
        sampling: settings of the pictures.
        items: the conditions.
        groups: number of pictures of each condition.
        folder: folder of the files, see `picture_path`.
        scale: scale of the ControlNet; 0 switches it off.
        batch_size: largest number of pictures in one call.
        progress: told how far it is.

    Returns:
        Number of pictures that were drawn now.

    Raises:
        UsageError: a picture there belongs to another caption or control map.
    """
    folder.mkdir(parents=True, exist_ok=True)
    todo = [job for job in itertools.product(items, range(groups)) if not _is_drawn(folder, *job, sampling)]
    drawn, step = 0, f"draw {folder.name}"
    progress(step)
    for batch in _batches(todo, min(batch_size, sampler.calls.max)):
        progress(step, drawn, len(todo))
        controls = torch.cat([to_pixels(open_picture(item.control)) for item, _ in batch])
        texts = [_text(item, group, sampling) for item, group in batch]
        seeds = [int(text["seed"]) for text in texts]
        images = sampler.draw([item.caption for item, _ in batch], controls, seeds, sampling, scale)
        for (item, group), text, image in zip(batch, texts, images, strict=True):
            save_png(image, picture_path(folder, item.id, group), text)
        drawn += len(batch)
    return drawn


def open_picture(path: Path) -> Image.Image:
    """Return a picture of ours, RGB.

    Raises:
        UsageError: the picture is missing or damaged.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as a picture: {error}. Delete it to have it made again.") from error


def sampling_settings(sampler: Sampler, sampling: Sampling) -> dict[str, Any]:
    """Return everything that a picture depends on besides its condition."""
    scheduler = type(sampler.pipe.scheduler).__name__
    more = {"scheduler": scheduler, "size": list(sampler.size), "dtype": sampler.source["dtype"]}
    return {"weights": sampler.key, **asdict(sampling), **more}


def _text(item: Item, group: int, sampling: Sampling) -> dict[str, str]:
    """Return what a picture's file says of it."""
    seed = str(picture_seed(sampling.seed, item.id, group))
    return {"prompt": item.caption, "control_sha256": item.digest, "seed": seed}


def _is_drawn(folder: Path, item: Item, group: int, sampling: Sampling) -> bool:
    path = picture_path(folder, item.id, group)
    if not path.exists():
        return False
    try:
        with Image.open(path) as image:
            found = dict(getattr(image, "text", {}))  # reads the file to its end
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as a picture: {error}. Delete it to have it drawn again.") from error
    if wrong := [name for name, value in _text(item, group, sampling).items() if found.get(name) != value]:
        raise UsageError(
            f"{path} was drawn for another {' and '.join(wrong)}: the data has changed. Name another --output, or "
            f"delete {folder}."
        )
    return True


def _batches(jobs: list[tuple[Item, int]], size: int) -> Iterator[list[tuple[Item, int]]]:
    for start in range(0, len(jobs), size):
        yield jobs[start : start + size]
