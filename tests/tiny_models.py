"""Small real models that the tests share."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel, UniPCMultistepScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from icexport.models.probe import InnerControlProbe, ProbeConfig
from icexport.models.taps import Taps

TEXT_LENGTH = 12


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Random weights everywhere: a fresh ControlNet ends in zeros and would prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def tiny_tokenizer(length: int = TEXT_LENGTH) -> CLIPTokenizer:
    """CLIP's tokenizer class over single letters."""
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=length)


def tiny_unet() -> UNet2DConditionModel:
    """Two levels, heads of 16 channels, attention on both."""
    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=(1, 2),
        norm_num_groups=4,
    ).eval()


def tiny_probe(unet: UNet2DConditionModel) -> InnerControlProbe:
    """A probe for ``tiny_unet``."""
    torch.manual_seed(4)
    config = ProbeConfig(
        dims=Taps(unet, "attn").dims,
        projection_dim=32,
        num_groups=4,
        head_dims=(8, 4),
        time_embed_dim=unet.time_embedding.linear_2.out_features,
        condition="canny",
    )
    return InnerControlProbe(config).eval()


def save_tiny_model(folder: Path) -> Path:
    """A complete controlled model with random weights, in the layout of the reference model; 16 px by default."""
    unet = tiny_unet()
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    randomise(controlnet, 2)
    torch.manual_seed(3)
    vae = AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )
    tokenizer = tiny_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    for name, module in {
        "unet": unet,
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "controlnet-canny": controlnet,
        "probe-canny": tiny_probe(unet),
        "scheduler": UniPCMultistepScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    }.items():
        module.save_pretrained(folder / name)
    index = {
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
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def overflowing_vae() -> AutoencoderKL:
    """A decoder in whose middle one convolution gives some 1e5, which the norm behind it brings back."""
    torch.manual_seed(3)
    vae = AutoencoderKL(
        block_out_channels=(16,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4,
        latent_channels=4,
    )
    with torch.no_grad():
        vae.decoder.mid_block.resnets[0].conv1.weight.mul_(3e5)
    return vae.eval().requires_grad_(False)


def overflowing_unet() -> UNet2DConditionModel:
    """A UNet of one level whose residual stream reaches some 1e5 from the middle on, until the last norm."""
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=1,
        norm_num_groups=4,
    )
    with torch.no_grad():
        unet.mid_block.resnets[0].conv2.weight.mul_(3e5)
    return unet.eval().requires_grad_(False)


def save_tiny_depth(folder: Path, side: int = 32, patch: int = 8, std: float = 0.5, bias: float | None = None) -> None:
    """Write a random DPT with its processor.

    Args:
        folder: folder that is made.
        side: pixels that the processor scales pictures to.
        patch: pixels of one of its patches.
        std: standard deviation of its weights.
        bias: bias of its last convolution: a high one keeps the ReLU behind it from giving zeros only; None: as it is.
    """
    torch.manual_seed(0)
    # Here, because the environment of the optimum extra has transformers 4, and no depth network.
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessorPil

    config = DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=side,
        patch_size=patch,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        use_auxiliary_head=False,
        initializer_range=std,
    )
    network = DPTForDepthEstimation(config)
    if bias is not None:
        torch.nn.init.constant_(network.head.head[4].bias, bias)
    network.save_pretrained(folder)
    DPTImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)
