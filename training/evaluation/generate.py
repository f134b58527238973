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
from diffusers import StableDiffusionControlNetPipeline
from PIL import Image

from icexport.bundle.store import Bundle
from icexport.errors import UsageError
from icexport.host.pictures import save_png, to_pixels
from icexport.models.dtypes import DTYPES
from icexport.models.loading import ModelSource
from icexport.progress import Progress
from icexport.runtime.pipeline import InnerControlPipeline
from icexport.runtime.schedulers import scheduler_class

SETTINGS = "settings.json"
UNIPC = "UniPCMultistep"
PAPER_NEGATIVE_PROMPT = "worst quality, low quality"


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn; the defaults are the paper's.

    Attributes:
        steps: of the scheduler.
        guidance_scale: weight of the prompt; 1: no guidance.
        negative_prompt: what to avoid.
        scheduler: ``unipc``, or a name of diffusers (``DDIM`` ...).
        seed: of all pictures together.
    """

    steps: int = 20
    guidance_scale: float = 7.5
    negative_prompt: str = PAPER_NEGATIVE_PROMPT
    scheduler: str = "unipc"
    seed: int = 42


@dataclass(frozen=True)
class Item:
    """One condition to draw: what is needed of it, without its pixels.

    Attributes:
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
        source: what was loaded, for people.
        key: hash of the weights; samplers of equal key, dtype and sampling draw the same.
        size: (height, width) in pixels.
        batches: smallest and largest number of pictures in one call.
    """

    pipe: Any
    source: dict[str, Any]
    key: str
    size: tuple[int, int]
    batches: tuple[int, int | None] = (1, None)

    def draw(
        self, captions: list[str], controls: torch.Tensor, seeds: list[int], sampling: Sampling, scale: float
    ) -> list[Image.Image]:
        """One picture for each caption, control map ``[N,3,H,W]`` in [0,1] and seed."""
        count = len(captions)
        # A bundle may demand more pictures than are left to draw: the last one again, which is thrown away.
        index = [*range(count), *[count - 1] * max(0, self.batches[0] - count)]
        more = {"check_fidelity": False} if isinstance(self.pipe, InnerControlPipeline) else {}
        images = self.pipe(
            [captions[i] for i in index],
            image=controls[index].to(self.pipe.device),
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            negative_prompt=[sampling.negative_prompt] * len(index),
            # On the CPU, whose random numbers are the same everywhere.
            generator=[torch.Generator().manual_seed(seeds[i]) for i in index],
            controlnet_conditioning_scale=scale,
            **more,
        ).images
        return images[:count]


def load_model(
    condition: str,
    model: str,
    controlnet: str | None,
    sampling: Sampling,
    dtype: str = "fp32",
    device: str | None = None,
    size: tuple[int, int] | None = None,
) -> Sampler:
    """Diffusers' own pipeline on a base model and a ControlNet, loaded strictly and from safetensors.

    Args:
        condition: names the ControlNet's folder where ``controlnet`` is None.
        model: ``reference``, a folder or a Hub id.
        controlnet: a folder or a Hub id.
        sampling: its scheduler is checked here.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        device: None: the CPU.
        size: (height, width); None: the model's own.

    Raises:
        UsageError: an unknown scheduler, or no ControlNet for the condition.
        CheckpointError: weights that are missing or damaged.
    """
    source = ModelSource.find(condition, model, controlnet, "none")
    kind = DTYPES[dtype]
    unet, vae = source.unet(kind), source.vae(kind)
    pipe = StableDiffusionControlNetPipeline(
        vae=vae,
        text_encoder=source.text_encoder(kind),
        tokenizer=source.tokenizer(),
        unet=unet,
        controlnet=source.controlnet_model(kind),
        scheduler=_scheduler(source.base, sampling.scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(device or "cpu")
    pipe.set_progress_bar_config(disable=True)
    side = unet.config.sample_size * pipe.vae_scale_factor
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
    """A bundle's pipeline. Arguments and errors as `load_model`'s and those of `InnerControlPipeline`."""
    bundle = Bundle(path)
    pipe = InnerControlPipeline.from_pretrained(bundle, backend=backend, device=device)
    pipe.scheduler = _scheduler(bundle.path, sampling.scheduler)
    pipe.set_progress_bar_config(disable=True)
    profile = bundle.manifest.profile
    source = {"bundle": str(path), "backend": pipe.backend, "dtype": bundle.manifest.dtype}
    usual = profile.height.opt, profile.width.opt
    return Sampler(pipe, source, bundle.manifest.key, size or usual, (profile.batch.min, profile.batch.max))


def picture_seed(seed: int, condition_id: str, group: int) -> int:
    """Seed of one picture, a function of its arguments alone: 63 bits of a hash."""
    text = json.dumps([seed, condition_id, group], ensure_ascii=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def picture_path(folder: Path, condition_id: str, group: int) -> Path:
    """``<id>-<group>.png`` in ``folder``."""
    return folder / file_name(f"{condition_id}-{group}")


def file_name(name: str) -> str:
    """``<name>.png``; what a file name cannot hold is written as in URLs (``/`` as ``%2F``)."""
    return f"{quote(name, safe=' ()[]+,=@')}.png"


def claim(output: Path, settings: dict[str, Any]) -> None:
    """Note what the pictures in ``output`` are drawn with, or check that those there were drawn with the same.

    Raises:
        UsageError: they were not; every difference is listed.
    """
    path = output / SETTINGS
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(settings, indent=2) + "\n")
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
        sampler: draws them.
        sampling: with these settings.
        items: the conditions.
        groups: pictures of each.
        folder: of the files, see `picture_path`.
        scale: of the ControlNet; 0 switches it off.
        batch_size: largest number of pictures in one call.
        progress: told how far it is.

    Returns:
        Number of pictures that were drawn now.

    Raises:
        UsageError: a picture there belongs to another caption or control map.
    """
    folder.mkdir(parents=True, exist_ok=True)
    todo = [job for job in itertools.product(items, range(groups)) if not _is_drawn(folder, *job, sampling)]
    drawn = 0
    for batch in _batches(todo, min(batch_size, sampler.batches[1] or batch_size)):
        progress(folder.name, drawn / len(todo))
        controls = torch.cat([to_pixels(open_picture(item.control)) for item, _ in batch])
        texts = [_text(item, group, sampling) for item, group in batch]
        seeds = [int(text["seed"]) for text in texts]
        images = sampler.draw([item.caption for item, _ in batch], controls, seeds, sampling, scale)
        for (item, group), text, image in zip(batch, texts, images, strict=True):
            save_png(image, picture_path(folder, item.id, group), text)
        drawn += len(batch)
    return drawn


def open_picture(path: Path) -> Image.Image:
    """A picture of ours, RGB.

    Raises:
        UsageError: it is missing or damaged.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as a picture: {error}. Delete it to have it made again.") from error


def write_atomically(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sampling_settings(sampler: Sampler, sampling: Sampling) -> dict[str, Any]:
    """Everything that a picture depends on besides its condition."""
    scheduler = type(sampler.pipe.scheduler).__name__
    more = {"scheduler": scheduler, "size": list(sampler.size), "dtype": sampler.source["dtype"]}
    return {"weights": sampler.key, **asdict(sampling), **more}


def _scheduler(folder: Path, name: str) -> Any:
    """The scheduler of this name, with the noise schedule of the model in ``folder``."""
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    own = scheduler_class(config["_class_name"]).from_config(config)
    wanted = scheduler_class(UNIPC if name.lower() == "unipc" else name)
    if wanted not in own.compatibles:
        names = ", ".join(sorted(kind.__name__.removesuffix("Scheduler") for kind in own.compatibles))
        raise UsageError(f"--scheduler {name} does not fit this model. Those that do: unipc, {names}.")
    try:
        return wanted.from_config(own.config)
    except ImportError as error:  # a scheduler that needs another library
        raise UsageError(f"--scheduler {name}: {' '.join(str(error).split())}") from error


def _text(item: Item, group: int, sampling: Sampling) -> dict[str, str]:
    """What a picture's file says of it."""
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
