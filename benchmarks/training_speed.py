"""Training speed: our ControlNet update beside that of diffusers' example, and what masked decoding saves.

    python -m benchmarks.training_speed --updates 20 --rounds 3

Both loops train the same ControlNet for the same base model, from the same folder of pictures and control maps, with
the same batch and precision, in one process, rounds interleaved. The other loop is written out here from what
train_controlnet.py of diffusers 0.42 does in an update: decode and resize the pictures, encode them, add noise, embed
the prompts, ControlNet, UNet, mean squared error, backward, clip, AdamW, scheduler, and the loss to the host for the
progress bar. The example itself needs torchvision. The last line on stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import load_dataset
from diffusers.optimization import get_scheduler
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from icexport import conditions
from training.data.config import DataConfig
from training.data.loading import open_data
from training.data.scenes import render_many
from training.loop.trainer import TrainerConfig, train
from training.tasks.controlnet import ControlNetTask
from training.tasks.extractors import reward_extractor
from training.tasks.frozen import BaseModels, load_base, new_controlnet
from training.tasks.losses import LossConfig, in_range, masked_mean, reward_loss

SIZE = 64
PICTURES = 64
RATE = 1e-5


def make_data(folder: Path) -> None:
    """Make a folder of scenes and their edges as diffusers' example reads it."""
    scenes = render_many(range(PICTURES))
    pixels = torch.from_numpy(scenes.images).permute(0, 3, 1, 2).float() / 255
    edges = conditions.get("canny").extract_batch(pixels)
    rows = []
    for i, (image, edge, caption) in enumerate(zip(scenes.images, edges, scenes.captions, strict=True)):
        Image.fromarray(image).save(folder / f"{i}.png")
        levels = (255 * edge).byte().permute(1, 2, 0).numpy()
        Image.fromarray(levels).save(folder / f"control-{i}.png")
        rows.append({"file_name": f"{i}.png", "control_file_name": f"control-{i}.png", "text": caption})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def ours(models: BaseModels, data: Path, batch: int, updates: int, precision: str) -> float:
    """Return pictures a second of our loop, data loading and log included."""
    batches = open_data(DataConfig(str(data), control_column="control", resolution=SIZE), models.tokenize, batch)
    torch.manual_seed(0)
    task = ControlNetTask(new_controlnet(models), models, LossConfig(), condition=conditions.get("canny"))
    config = TrainerConfig(
        steps=updates, batch_size=batch, learning_rate=RATE, precision=precision, ema_decay=None,  # type: ignore[arg-type]
        checkpoint_every=updates,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as output:
        return train(task, batches, config, Path(output)).pictures_per_second


def theirs(models: BaseModels, data: Path, batch: int, updates: int, precision: str) -> float:
    """Return pictures a second of the example's loop, data loading included."""
    accelerator = Accelerator(mixed_precision=precision)
    torch.manual_seed(0)
    controlnet = new_controlnet(models)
    optimizer = torch.optim.AdamW(controlnet.parameters(), lr=RATE, weight_decay=1e-2)
    schedule = get_scheduler("constant", optimizer)
    loader = DataLoader(_Example(data, models), shuffle=True, batch_size=batch, drop_last=True)
    controlnet, optimizer, loader, schedule = accelerator.prepare(controlnet, optimizer, loader, schedule)
    frozen = torch.bfloat16 if precision == "bf16" else torch.float32
    vae, unet, text_encoder = (
        copy.deepcopy(m).to(accelerator.device, frozen) for m in (models.vae, models.unet, models.text_encoder)
    )
    noise_scheduler, factor = models.scheduler, vae.config["scaling_factor"]
    stream = _endless(loader)
    started = time.perf_counter()
    for _ in range(updates):
        pixels, control, input_ids = next(stream)
        with accelerator.accumulate(controlnet):
            latents = vae.encode(pixels.to(frozen)).latent_dist.sample() * factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(models.steps, (len(latents),), device=latents.device)
            noisy = noise_scheduler.add_noise(latents, noise, timesteps)
            text = text_encoder(input_ids)[0]
            down, mid = controlnet(noisy, timesteps, text, control.to(frozen), return_dict=False)
            added = {
                "down_block_additional_residuals": [residual.to(frozen) for residual in down],
                "mid_block_additional_residual": mid.to(frozen),
            }
            output = unet(noisy, timesteps, text, **added).sample
            target = noise_scheduler.get_velocity(latents, noise, timesteps)
            loss = F.mse_loss(output.float(), target.float())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(controlnet.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        loss.detach().item()
    accelerator.free_memory()
    return updates * batch / (time.perf_counter() - started)


class _Example(torch.utils.data.Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Pictures, control maps and tokens, decoded and resized when they are asked for."""

    def __init__(self, folder: Path, models: BaseModels) -> None:
        self._rows = load_dataset("json", data_files=str(folder / "metadata.jsonl"), split="train")
        self._folder = folder
        self._tokens = models.tokenize(list(self._rows["text"]))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        row = self._rows[index]
        pixels, control = (self._tensor(row[name]) for name in ("file_name", "control_file_name"))
        return pixels * 2 - 1, control, self._tokens[index]

    def _tensor(self, name: str) -> Tensor:
        with Image.open(self._folder / name) as picture:
            resized = picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def reward_seconds(models: BaseModels, batch: int, rounds: int) -> dict[str, float]:
    """Time the reward with its gradient for t <= 200: only the samples that count, and all of them."""
    condition = conditions.get("canny")
    extractor = reward_extractor(condition)
    generator = torch.Generator().manual_seed(0)
    side = SIZE * models.unet.config["sample_size"] // (models.size or SIZE)
    pixels = torch.rand(batch, 3, SIZE, SIZE, generator=generator)
    target = extractor.target(condition.extract_batch(pixels), pixels)
    found: dict[str, list[float]] = {"masked": [], "all": []}
    for _ in range(rounds):
        timesteps = torch.randint(models.steps, (batch,), generator=generator)
        latents = torch.randn(batch, 4, side, side, generator=generator).requires_grad_()

        def every(latents: Tensor = latents, timesteps: Tensor = timesteps) -> Tensor:
            errors = (extractor(models.decode(latents)) - target).square().mean((1, 2, 3))
            return masked_mean(errors, in_range(timesteps, (0, 200)))

        def masked(latents: Tensor = latents, timesteps: Tensor = timesteps) -> Tensor:
            return reward_loss(latents, target, timesteps, (0, 200), models.decode, extractor)

        losses = {}
        for name, compute in (("masked", masked), ("all", every)):
            started = time.perf_counter()
            losses[name] = compute()
            if losses[name].requires_grad:  # a batch without any such timestep costs nothing
                torch.autograd.backward(losses[name])
            found[name].append(time.perf_counter() - started)
        torch.testing.assert_close(losses["masked"], losses["all"], rtol=1e-4, atol=1e-6)
    return {name: round(statistics.median(values), 4) for name, values in found.items()}


def main() -> None:
    """Run the command line of ``python -m benchmarks.training_speed``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--updates", type=int, default=20, help="of one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    args = parser.parse_args()
    models = load_base("reference")
    speeds: dict[str, list[float]] = {"icexport": [], "diffusers": []}
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder))
        options = (models, Path(folder), args.batch_size)
        for turn in range(args.rounds + 1):
            for name, run in (("icexport", ours), ("diffusers", theirs)):
                speed = run(*options, args.updates if turn else 2, args.precision)  # the first round warms up
                if turn:
                    speeds[name].append(round(speed, 2))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    reward = reward_seconds(models, args.batch_size, 10 * args.rounds)
    found = {
        "batch_size": args.batch_size,
        "precision": args.precision,
        "pictures_per_second": medians,
        "rounds": speeds,
        "ratio": round(medians["icexport"] / medians["diffusers"], 3),
        "reward_seconds": reward,
        "reward_saved": round(1 - reward["masked"] / reward["all"], 3),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
