"""The frozen networks that training runs: the base model, what a batch becomes, and reading a probe.

Whatever is trained is a registered module of a task; everything here is held beside it, so that ``state_dict``, DDP
and the optimiser see the trained network only, and a copy of a task shares the frozen ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from icexport.conditions import Condition
from icexport.models import loading
from icexport.models.base_model import find_base
from icexport.models.fit import check_fit
from icexport.models.probe import InnerControlProbe
from icexport.models.sizes import size_multiple, vae_factor

EMBEDDING_CHANNELS = (16, 32, 96, 256)
"""Widths of a ControlNet's control map embedding, which halves the map from each to the next: factor 8 in all."""


@dataclass
class BaseModels:
    """A frozen Stable Diffusion.

    Attributes:
        unet: predicts noise or velocity, as ``scheduler.config.prediction_type`` says.
        vae: takes pixels to latents and back.
        text_encoder: takes token ids to prompt embeddings.
        tokenizer: tokenizer of the text encoder.
        scheduler: the noise schedule of training.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDPMScheduler

    def autocast(self) -> torch.autocast:
        """Let float32 networks and latents meet networks of a half type, outside of the trainer."""
        half = self.unet.dtype != torch.float32
        return torch.autocast(self.unet.device.type, self.unet.dtype if half else None, enabled=half)

    @property
    def configs(self) -> dict[str, Mapping[str, Any]]:
        """Configs of the networks, as ``icexport.models.fit`` compares them."""
        return {
            "unet": self.unet.config,
            "vae": self.vae.config,
            "text_encoder": self.text_encoder.config.to_dict(),
        }

    def check_fit(self, condition: str, controlnet: ControlNetModel | None, probe: InnerControlProbe | None) -> None:
        """Refuse networks that do not belong to this base model, before anything is trained.

        Raises:
            CheckpointError: a network does not fit; everything that does not is listed.
        """
        configs = self.configs | ({} if controlnet is None else {"controlnet": controlnet.config})
        check_fit(configs, condition, None if probe is None else probe.config)

    @property
    def steps(self) -> int:
        """Number of timesteps T of the noise schedule."""
        return int(self.scheduler.config["num_train_timesteps"])

    @property
    def size(self) -> int | None:
        """Height and width in pixels that the model was made for, or None where it does not say."""
        native = self.unet.config["sample_size"]
        return native * vae_factor(self.vae.config) if isinstance(native, int) else None

    @property
    def multiple(self) -> int:
        """Height and width in pixels must be multiples of this."""
        return size_multiple(self.unet.config, self.vae.config)

    def tokenize(self, texts: list[str]) -> Tensor:
        """Return token ids int64 ``[len(texts),S]``, padded and cut to the text encoder's length S."""
        length = int(self.text_encoder.config.max_position_embeddings)
        ids = self.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return torch.as_tensor(ids.input_ids, dtype=torch.int64)

    @cached_property
    def empty_ids(self) -> Tensor:
        """Token ids int64 ``[S]`` of the empty prompt."""
        return self.tokenize([""])[0]

    @torch.no_grad()
    def embed(self, input_ids: Tensor) -> Tensor:
        """Return prompt embeddings ``[B,S,D]`` of token ids ``[B,S]``."""
        embeds: Tensor = self.text_encoder(input_ids)[0]
        return embeds

    @torch.no_grad()
    def encode(self, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return scaled latents ``[B,4,h,w]`` float32 of ``pixels`` ``[B,3,H,W]`` in [0,1].

        Args:
            pixels: pictures on the networks' device.
            generator: generator of the CPU that samples the posterior; None: its mean.
        """
        posterior = self.vae.encode((2 * pixels - 1).to(self.vae.dtype)).latent_dist
        latents: Tensor = posterior.mean.float()
        if generator is not None:
            noise = torch.randn(latents.shape, generator=generator).to(latents.device)
            latents = latents + posterior.std.float() * noise
        return latents * float(self.vae.config["scaling_factor"])

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels ``[B,3,H,W]`` float32 in [0,1] of scaled latents ``[B,4,h,w]``; gradients pass."""
        scaled = (latents / float(self.vae.config["scaling_factor"])).to(self.vae.dtype)
        return (self.vae.decode(scaled).sample.float() / 2 + 0.5).clamp(0, 1)


@dataclass
class Frozen:
    """What a task runs but does not train: no module, and so no part of the task's state, and shared by its copies."""

    models: BaseModels
    controlnet: ControlNetModel | None = None
    probe: InnerControlProbe | None = None
    device: torch.device | None = None

    def __post_init__(self) -> None:
        """Freeze every network."""
        for module in self._networks.values():
            module.eval().requires_grad_(False)

    @property
    def _networks(self) -> dict[str, nn.Module]:
        models = self.models
        found = {"unet": models.unet, "vae": models.vae, "text_encoder": models.text_encoder}
        own = {"controlnet": self.controlnet, "probe": self.probe}
        return found | {name: module for name, module in own.items() if module is not None}

    def to(self, device: torch.device) -> None:
        """Move everything to ``device``, once."""
        if self.device == device:
            return
        for module in self._networks.values():
            module.to(device)
        self.models.scheduler.alphas_cumprod = self.models.scheduler.alphas_cumprod.to(device)
        self.device = device

    def fingerprints(self) -> dict[str, str]:
        """Return a short hash of each network's weights, of the first of every tensor: others give another one."""
        return {name: _fingerprint(module) for name, module in self._networks.items()}


def _fingerprint(module: nn.Module) -> str:
    first = torch.cat([p.detach().flatten()[:16].float() for p in module.parameters()])
    return hashlib.sha256(first.cpu().numpy().tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Noised:
    """A batch as the networks take it, on their device.

    Attributes:
        latents: scaled latents, float32 ``[B,4,h,w]``.
        noise: noise of the same shape and type as the latents.
        noisy: the latents with noise of each sample's timestep.
        timesteps: int64 ``[B]``, uniform in 0..T-1.
        host_timesteps: the timesteps on the CPU, so that nobody has to wait for the device to know them.
        text: prompt embeddings ``[B,S,D]``.
        control: control maps float32 ``[B,3,H,W]`` in [0,1].
        pixels: pictures, float32 ``[B,3,H,W]`` in [0,1], or None where the batch has none.
    """

    latents: Tensor
    noise: Tensor
    noisy: Tensor
    timesteps: Tensor
    host_timesteps: Tensor
    text: Tensor
    control: Tensor
    pixels: Tensor | None


@torch.no_grad()
def noised(
    batch: dict[str, Any], models: BaseModels, condition: Condition, generator: torch.Generator, text_dropout: float
) -> Noised:
    """Encode, add noise, embed prompts, extract control maps where the batch has none.

    The draws do not depend on what is trained or on which losses are on, so that runs of one seed see the same noise.

    Args:
        batch: ``pixels`` or ``latents``, ``control`` unless there are pixels, ``input_ids``; on the CPU.
        models: base model on the device where everything is to run.
        condition: extracts the control maps.
        generator: generator of the CPU.
        text_dropout: probability that a sample's prompt is the empty one.
    """
    device, samples = models.unet.device, len(batch["input_ids"])
    dropped = torch.rand(samples, generator=generator) < text_dropout
    host_timesteps = torch.randint(models.steps, (samples,), generator=generator)
    pixels: Any = batch["pixels"].to(device) if "pixels" in batch else None
    latents = batch["latents"].to(device) if "latents" in batch else models.encode(pixels, generator)
    noise = torch.randn(latents.shape, generator=generator).to(device)
    timesteps = host_timesteps.to(device)
    input_ids = torch.where(dropped[:, None], models.empty_ids, batch["input_ids"])
    return Noised(
        latents=latents,
        noise=noise,
        noisy=models.scheduler.add_noise(latents, noise, timesteps),
        timesteps=timesteps,
        host_timesteps=host_timesteps,
        text=models.embed(input_ids.to(device)),
        control=control_maps(batch, condition, device),
        pixels=pixels,
    )


@torch.no_grad()
def control_maps(batch: dict[str, Any], condition: Condition, device: torch.device) -> Tensor:
    """Return the batch's own control maps, or extract those of its pixels in float32: ``[B,3,H,W]`` on ``device``."""
    if "control" in batch:
        return batch["control"].to(device)
    with torch.autocast(device.type, enabled=False):
        return condition.extract_batch(batch["pixels"].to(device))


def residuals(controlnet: ControlNetModel, sample: Noised, control: Tensor) -> dict[str, Any]:
    """Return what ``controlnet`` adds to the UNet, as keyword arguments of the UNet."""
    down, mid = controlnet(sample.noisy, sample.timesteps, sample.text, control, return_dict=False)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


def read(probe: InnerControlProbe, models: BaseModels, taps: list[Tensor], timesteps: Tensor) -> Tensor:
    """Return the probe's reading ``[B,C,h,w]``, in float32 whatever the taps' type.

    The embedding is that of the timestep that the probe was made for (``ProbeConfig.timestep_convention``).
    """
    unet, embedding = models.unet, None
    if probe.config.time_embed_dim is not None:
        with torch.no_grad():
            projected = unet.time_proj(probe.config.read_timestep(timesteps, models.steps))
            embedding = unet.time_embedding(projected.to(unet.dtype)).float()
    with torch.autocast(timesteps.device.type, enabled=False):
        reading: Tensor = probe([tap.float() for tap in taps], embedding)
    return reading


def probe_target(probe: InnerControlProbe, control: Tensor, size: Iterable[int]) -> Tensor:
    """Return what the probe should read of control maps ``[B,3,H,W]`` in [0,1]: ``[B,C,*size]``, in ``control_range``.

    Averaged over areas rather than picked: a line of one pixel would be lost between the cells of a coarse reading.
    """
    if probe.config.out_channels != control.shape[1]:
        control = control.mean(1, keepdim=True).expand(-1, probe.config.out_channels, -1, -1)
    low, high = probe.config.control_range
    return F.interpolate(control, tuple(size), mode="area") * (high - low) + low


def load_base(name: str, dtype: torch.dtype = torch.float32) -> BaseModels:
    """Return a frozen base model.

    Args:
        name: ``reference``, a folder of diffusers, or a Hub id.
        dtype: element type of all networks.

    Raises:
        CheckpointError: a part is missing, damaged, of another layout, or of a kind that cannot be trained on.
    """
    base = find_base(name)
    models = BaseModels(
        unet=loading.load_unet(base.parts["unet"], dtype),
        vae=loading.load_vae(base.parts["vae"], dtype),
        text_encoder=loading.load_text_encoder(base.parts["text_encoder"], dtype),
        tokenizer=loading.load_tokenizer(base.folders["tokenizer"]),
        # Files of samplers do not name clip_sample, whose default clips latents.
        scheduler=DDPMScheduler.from_config(base.scheduler_config(), clip_sample=False),
    )
    check_fit(models.configs, condition="", family=base.family)
    return models


def new_controlnet(models: BaseModels) -> ControlNetModel:
    """Return a ControlNet that starts as a copy of the UNet's encoder, in float32.

    Its control map embedding halves the map as often as the autoencoder does.
    """
    halvings = vae_factor(models.vae.config).bit_length() - 1
    channels = tuple(EMBEDDING_CHANNELS[min(i, len(EMBEDDING_CHANNELS) - 1)] for i in range(halvings + 1))
    return ControlNetModel.from_unet(models.unet, conditioning_embedding_out_channels=channels).float()
