"""The reference model's denoiser: a UNet of Stable Diffusion's layout and its text encoder, trained together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.loop.trainer import Task
from training.reference.layout import save_text_encoder

TEXT_WIDTH = 96
TEXT_DROPOUT = 0.1


def new_unet() -> UNet2DConditionModel:
    """Return an untrained UNet: SD 1.5's blocks in miniature, with heads of 32 channels."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 4, 4),
        norm_num_groups=16,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained CLIP text encoder over CLIP's real vocabulary."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=TEXT_WIDTH // 32,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def noise_scheduler() -> DDPMScheduler:
    """Make Stable Diffusion's noise schedule. Velocity prediction (as SD 2.x): stable colours after short training."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="v_prediction",
        clip_sample=False,
        steps_offset=1,
    )


class DenoiserTask(Task):
    """Trains UNet and text encoder together.

    Args:
        unet: where training starts; trained in place.
        text_encoder: text encoder, trained in place likewise.
        empty_ids: int64 ``[77]``, token ids of the empty prompt.
        name: name of the stage.
    """

    def __init__(
        self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, empty_ids: torch.Tensor, name: str
    ) -> None:
        super().__init__()
        self.name = name
        self.unet = unet.train().requires_grad_(True)
        self.text_encoder = text_encoder.train().requires_grad_(True)
        self._empty_ids = empty_ids
        self._scheduler = noise_scheduler()

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Return the velocity's mean squared error of one batch of ``latents`` and ``input_ids``."""
        latents, input_ids = batch["latents"], batch["input_ids"]
        dropped = torch.rand(len(latents), generator=generator) < TEXT_DROPOUT
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(
            int(self._scheduler.config["num_train_timesteps"]), (len(latents),), generator=generator
        )
        noisy = self._scheduler.add_noise(latents, noise, timesteps).to(self.device)
        velocity = self._scheduler.get_velocity(latents, noise, timesteps).to(self.device)
        input_ids = torch.where(dropped[:, None], self._empty_ids, input_ids).to(self.device)
        output = self.unet(noisy, timesteps.to(self.device), self.text_encoder(input_ids)[0]).sample
        return {"loss": F.mse_loss(output.float(), velocity)}

    def save(self, folder: Path) -> None:
        """Write both as diffusers and transformers folders."""
        self.unet.save_pretrained(folder / "unet")
        save_text_encoder(self.text_encoder, folder / "text_encoder")
