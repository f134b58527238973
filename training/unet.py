"""The reference model's denoiser: a UNet of Stable Diffusion's layout and its text encoder, trained together."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.dataset import DiffusionSet
from training.loop import StageConfig, fit

TEXT_WIDTH = 96
TEXT_DROPOUT = 0.1


def new_unet() -> UNet2DConditionModel:
    """An untrained UNet: SD 1.5's blocks in miniature, with heads of 32 channels."""
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
    """An untrained CLIP text encoder over CLIP's real vocabulary."""
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
    """Stable Diffusion's noise schedule. Velocity prediction (as SD 2.x): stable colours after a short training."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="v_prediction",
        clip_sample=False,
        steps_offset=1,
    )


def draw(
    data: DiffusionSet, batch_size: int, text_dropout: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A random batch: picture indices ``[B]``, latents ``[B,4,h,w]`` and token ids ``[B,77]``, some of them empty."""
    index = torch.randint(len(data), (batch_size,), generator=generator)
    form = torch.randint(data.tokens.shape[1], (batch_size,), generator=generator)
    tokens = data.tokens[index, form]
    dropped = torch.rand(batch_size, generator=generator) < text_dropout
    return index, data.latents[index], torch.where(dropped[:, None], data.empty_tokens, tokens).long()


def add_noise(
    scheduler: DDPMScheduler, latents: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy latents, the velocity to predict (both ``[B,4,h,w]``) and the timesteps ``[B]``, uniform in 0..999."""
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(scheduler.config["num_train_timesteps"], (len(latents),), generator=generator)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    return noisy, scheduler.get_velocity(latents, noise, timesteps), timesteps


def train_unet(
    data: DiffusionSet, tokenizer: CLIPTokenizer, config: StageConfig, work: Path
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Train UNet and text encoder from scratch on ``data``; the averaged weights are returned, frozen."""
    torch.manual_seed(config.seed)
    unet, text_encoder, scheduler = new_unet().train(), new_text_encoder(tokenizer).train(), noise_scheduler()

    def loss_fn(batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        _, latents, tokens = draw(data, batch_size, TEXT_DROPOUT, generator)
        noisy, velocity, timesteps = add_noise(scheduler, latents, generator)
        with torch.autocast("cpu", torch.bfloat16):
            prompt_embeds = text_encoder(tokens)[0]
            output = unet(noisy, timesteps, prompt_embeds).sample
        return {"loss": F.mse_loss(output.float(), velocity)}

    fit("unet", [unet, text_encoder], loss_fn, config, work)
    return unet.eval().requires_grad_(False), text_encoder.eval().requires_grad_(False)
