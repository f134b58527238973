"""The reference model's autoencoder: diffusers' ``AutoencoderKL``, 64 px to 16 x 16 x 4."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import AutoencoderKL

from training.loop.trainer import Task

SD_SCALING_FACTOR = 0.18215
"""Stable Diffusion's latent scale: latents times this have about unit variance."""

KL_WEIGHT = 2e-3


def new_vae() -> AutoencoderKL:
    """Return an untrained autoencoder of the reference size (1.6 M parameters)."""
    channels = (32, 64, 96)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=64,
        scaling_factor=SD_SCALING_FACTOR,
        mid_block_add_attention=False,
    )


def rotate_hue(pixels: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Turn each picture's colours about the grey axis.

    Args:
        pixels: pictures ``[B,3,H,W]`` in [0,1].
        angle: angle of each picture ``[B]`` in radians.
    """
    third, root = 1 / 3, math.sqrt(1 / 3)
    cos, sin = angle.cos(), angle.sin()
    diagonal = cos + third * (1 - cos)
    left, right = third * (1 - cos) - root * sin, third * (1 - cos) + root * sin
    matrix = torch.stack((diagonal, left, right, right, diagonal, left, left, right, diagonal), -1).view(-1, 3, 3)
    return torch.einsum("bij,bjhw->bihw", matrix, pixels).clamp(0, 1)


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the L1 for sharpness, MSE for PSNR, and L1 of the picture gradients for clean edges."""
    difference = output - target
    gradients = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return difference.abs().mean() + 4 * difference.square().mean() + 0.25 * gradients


def augmented(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return ``pixels`` ``[B,3,H,W]`` in [0,1], half of them recoloured, half of the batches mirrored: in [-1,1]."""
    angle = torch.rand(len(pixels), generator=generator) * 2 * math.pi
    pixels = rotate_hue(pixels, angle * (torch.rand(len(pixels), generator=generator) < 0.5))
    if torch.rand((), generator=generator) < 0.5:
        pixels = pixels.flip(-1)
    return pixels * 2 - 1


class AutoencoderTask(Task):
    """Trains an autoencoder on pictures with flips and hue rotations.

    Args:
        vae: where training starts; trained in place.
        name: name of the stage.
    """

    def __init__(self, vae: AutoencoderKL, name: str) -> None:
        super().__init__()
        self.name = name
        self.vae = vae.train().requires_grad_(True)

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Return the reconstruction and divergence of one batch of ``pixels`` ``[B,3,H,W]`` in [0,1]."""
        target = augmented(batch["pixels"], generator).to(self.device)
        posterior = self.vae.encode(target).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(self.device)
        output = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        reconstruction = reconstruction_loss(output, target)
        mse = F.mse_loss(output.clamp(-1, 1), target) / 4
        return {"loss": reconstruction + KL_WEIGHT * kl, "kl": kl, "mse": mse}

    def save(self, folder: Path) -> None:
        """Write the autoencoder as a diffusers folder; its latents are not normalised yet."""
        self.vae.save_pretrained(folder)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
    """Return scaled latents ``[N,4,h,w]`` of uint8 pictures ``[N,3,H,W]`` (the posterior's mean)."""
    chunks = [vae.encode(chunk.float() / 127.5 - 1).latent_dist.mean for chunk in images.split(batch_size)]
    return torch.cat(chunks) * vae.config["scaling_factor"]


def encode_shared(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Call ``encode`` with the pictures divided among the processes; every process gets all latents."""
    state = PartialState()
    share = -(-len(images) // state.num_processes)
    part = encode(vae, images[state.process_index * share :][:share])
    gathered: list[torch.Tensor] = gather_object([part])
    return torch.cat(gathered)


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Return PSNR in dB of each picture (uint8 ``[N,3,H,W]``) after encoding and decoding, 8 bit as a user sees it."""
    values = []
    for chunk in images.split(64):
        decoded = vae.decode(vae.encode(chunk.float() / 127.5 - 1).latent_dist.mean).sample
        picture = ((decoded.clamp(-1, 1) + 1) * 127.5).round()
        mse = (picture - chunk.float()).square().mean(dim=(1, 2, 3)) / 255**2
        values.append(-10 * mse.clamp(min=1e-10).log10())
    return torch.cat(values)


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Give every latent channel mean 0 and standard deviation 1 after scaling, without changing a reconstruction.

    ``quant_conv`` and ``post_quant_conv`` are 1x1 convolutions, so the shift and scale fold into them exactly. Then
    Stable Diffusion's own scaling factor is right for this autoencoder too.
    """
    latents = encode(vae, images) / vae.config["scaling_factor"]
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    factor = 1 / (std * vae.config["scaling_factor"])
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight /= factor.view(1, -1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean) * factor
    quant.weight[:channels] *= factor.view(-1, 1, 1, 1)
    quant.bias[channels:] += 2 * factor.log()
