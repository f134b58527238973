"""The graphs that a model is split into: one small module for each, with its inputs and outputs described.

The split (ControlNet apart from UNet, probe apart from both) lets a condition be swapped without touching the UNet.
One run-time input, ``residual_scale``, expresses conditioning scale, guess mode, guidance start and end and per-sample
strength, so that none of them needs another graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from engines.base import TensorSpec
from icexport.errors import UnsupportedOptionError
from icexport.graphs.graph import Graph
from icexport.models.family import STABLE_DIFFUSION, Configs
from icexport.models.probe import InnerControlProbe, ProbeConfig
from icexport.models.sizes import latent_multiple, residual_channels, vae_factor
from icexport.models.source import ModelSource
from icexport.models.taps import Taps

if TYPE_CHECKING:
    from icexport.models.fused_probe import FusedProbe


class TextEncoderGraph(nn.Module):
    """``input_ids [b,S]``, ``clip_skip []`` to ``prompt_embeds [b,S,D]``; skip 0 is the last layer."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor, clip_skip: Tensor) -> tuple[Tensor]:
        """Return the chosen layer's states after the final layer norm, as diffusers' ``encode_prompt`` takes them."""
        core = getattr(self.text_encoder, "text_model", self.text_encoder)  # transformers 4 nests, 5 does not
        states: list[Tensor] = []
        with ExitStack() as hooks:
            for layer in core.encoder.layers:
                hooks.enter_context(
                    layer.register_forward_hook(
                        lambda _m, _a, out: states.append(out if torch.is_tensor(out) else out[0])
                    )
                )
            core(input_ids=input_ids)
        layer_index = (len(states) - 1 - clip_skip).reshape(1)
        return (core.final_layer_norm(torch.stack(states).index_select(0, layer_index)[0]),)


class ControlNetGraph(nn.Module):
    """``sample, timestep, prompt_embeds, control_map, residual_scale`` to the residuals."""

    def __init__(self, controlnet: ControlNetModel) -> None:
        super().__init__()
        self.controlnet = controlnet

    def forward(
        self, sample: Tensor, timestep: Tensor, prompt_embeds: Tensor, control_map: Tensor, residual_scale: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the residual i of sample b times ``residual_scale[b, i]``; the middle block's is the last."""
        down, mid = self.controlnet(
            sample, timestep, encoder_hidden_states=prompt_embeds, controlnet_cond=control_map, return_dict=False
        )
        scales = residual_scale[:, :, None, None, None].unbind(1)
        return tuple(residual * scale for residual, scale in zip((*down, mid), scales, strict=True))


class UNetGraph(nn.Module):
    """``sample, timestep, prompt_embeds, residuals…`` to ``noise_pred, taps…, time_embedding``."""

    def __init__(self, unet: UNet2DConditionModel, probe: ProbeConfig | None, train_timesteps: int) -> None:
        super().__init__()
        self.unet = unet
        self.taps = Taps(unet, probe.tap_kind) if probe else None
        self.probe = probe
        self.train_timesteps = train_timesteps

    def forward(
        self, sample: Tensor, timestep: Tensor, prompt_embeds: Tensor, *residuals: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the UNet's prediction, the activations that the probe reads, and the time embedding ``[B,E]``."""
        embeddings: list[Tensor] = []
        hook = self.unet.time_embedding.register_forward_hook(lambda _m, _a, output: embeddings.append(output))
        recording: AbstractContextManager[list[Tensor]] = self.taps.record() if self.taps else nullcontext([])
        with hook, recording as taps:
            (noise_pred,) = self.unet(
                sample,
                timestep,
                encoder_hidden_states=prompt_embeds,
                down_block_additional_residuals=residuals[:-1],
                mid_block_additional_residual=residuals[-1],
                return_dict=False,
            )
        (embedding,) = embeddings
        if self.probe is not None and self.probe.mirrored:
            read = self.probe.read_timestep(timestep, self.train_timesteps)
            sinusoids = self.unet.time_proj(read).to(sample.dtype)
            embedding = self.unet.time_embedding(sinusoids)
        return (noise_pred, *taps, embedding)


class ProbeGraph(nn.Module):
    """``taps…, time_embedding`` to ``reading``, the control map as the features show it."""

    def __init__(self, probe: InnerControlProbe | FusedProbe) -> None:
        super().__init__()
        self.probe = probe

    def forward(self, *tensors: Tensor) -> tuple[Tensor]:
        """Return ``reading [b,C,h,w]`` in [-1,1] of the conditional half's taps and time embeddings ``[b,E]``.

        A probe that is not conditioned on the timestep takes no time embeddings.
        """
        if self.probe.config.time_embed_dim is None:
            return (self.probe(tensors, None),)
        return (self.probe(tensors[:-1], tensors[-1]),)


class VaeDecoderGraph(nn.Module):
    """``latents`` (already divided by the scaling factor) to ``pixels`` in [-1,1]."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> tuple[Tensor]:
        """Decode ``[b,4,h,w]`` to ``[b,3,H,W]``."""
        (pixels,) = self.vae.decode(latents, return_dict=False)
        return (pixels,)


Count = Literal["samples", "pictures"]
"""What the first axis counts: with guidance, the UNet sees two samples of each picture."""

GRAPH_NAMES = STABLE_DIFFUSION.graph_names


def split(source: ModelSource, dtype: torch.dtype) -> Iterator[Graph]:
    """See ``icexport.graphs.split``."""
    unet_config, vae_config = source.config("unet"), source.config("vae")
    length = source.full_config("text_encoder")["max_position_embeddings"]
    yield text_encoder_graph(source.text_encoder(dtype), dtype)
    yield controlnet_graph(source.controlnet_model(dtype), length, vae_factor(vae_config), dtype)
    probe, unet = source.probe_model(dtype), source.unet(dtype)
    yield unet_graph(unet, length, probe.config if probe else None, dtype, source.train_timesteps)
    if probe:
        yield probe_graph(probe, unet, dtype)
    del unet, probe
    yield vae_decoder_graph(source.vae(dtype), latent_multiple(unet_config), dtype)


def outlines(configs: Configs) -> Iterator[Graph]:
    """Yield ControlNet, UNet and decoder without weights, on torch's meta device: what time goes to can be counted.

    The UNet comes without what a probe reads, which costs nothing.
    """
    length, factor = configs["text_encoder"]["max_position_embeddings"], vae_factor(configs["vae"])
    with torch.device("meta"):
        controlnet = ControlNetModel.from_config(configs["controlnet"])
        unet = UNet2DConditionModel.from_config(configs["unet"])
        vae = AutoencoderKL.from_config(configs["vae"])
    yield controlnet_graph(controlnet, length, factor, torch.float32)
    yield unet_graph(unet, length, None, torch.float32)
    yield vae_decoder_graph(vae, latent_multiple(configs["unet"]), torch.float32)


def text_encoder_graph(text_encoder: CLIPTextModel, dtype: torch.dtype) -> Graph:
    """Return the text encoder's graph; run once per prompt."""
    config = text_encoder.config
    length = config.max_position_embeddings
    return Graph(
        "text_encoder",
        TextEncoderGraph(text_encoder),
        (TensorSpec("input_ids", torch.int64, ("prompts", length)), TensorSpec("clip_skip", torch.int64, ())),
        (TensorSpec("prompt_embeds", dtype, ("prompts", length, config.hidden_size)),),
    )


def controlnet_graph(controlnet: ControlNetModel, text_length: int, factor: int, dtype: torch.dtype) -> Graph:
    """Return the ControlNet's graph.

    Args:
        controlnet: the model.
        text_length: number of tokens per prompt.
        factor: number of pixels per latent cell and side (``vae_factor``).
        dtype: dtype of every float input and output except the timestep, which is always float32.

    Raises:
        UnsupportedOptionError: the ControlNet pools its residuals globally (the shuffle kind).
    """
    config = controlnet.config
    if config["global_pool_conditions"]:
        raise UnsupportedOptionError(
            "This ControlNet pools its residuals globally (config.global_pool_conditions, the 'shuffle' kind), which "
            "one residual_scale input cannot express. Use one with spatial control: canny, hed, lineart or depth."
        )
    residuals = residual_channels(config)
    multiple = latent_multiple(config)
    inputs = (
        *_step_inputs(config, text_length, multiple, dtype),
        TensorSpec(
            "control_map",
            dtype,
            ("samples", config["conditioning_channels"], f"{multiple * factor}*rows", f"{multiple * factor}*columns"),
        ),
        TensorSpec("residual_scale", dtype, ("samples", len(residuals))),
    )
    return Graph("controlnet", ControlNetGraph(controlnet), inputs, _residual_specs(config, dtype))


def unet_graph(
    unet: UNet2DConditionModel,
    text_length: int,
    probe: ProbeConfig | None,
    dtype: torch.dtype,
    train_timesteps: int = 1000,
) -> Graph:
    """Return the UNet's graph, with what the probe reads as outputs; None for a bundle without a probe."""
    config = unet.config
    module = UNetGraph(unet, probe, train_timesteps)
    multiple = latent_multiple(config)
    inputs = (*_step_inputs(config, text_length, multiple, dtype), *_residual_specs(config, dtype))
    outputs = (
        TensorSpec("noise_pred", dtype, _map_shape("samples", config["out_channels"], multiple)),
        *(_tap_specs(module.taps, "samples", multiple, dtype) if module.taps else ()),
        TensorSpec("time_embedding", dtype, ("samples", unet.time_embedding.linear_2.out_features)),
    )
    return Graph("unet", module, inputs, outputs)


def probe_graph(probe: InnerControlProbe, unet: UNet2DConditionModel, dtype: torch.dtype) -> Graph:
    """Return the probe's graph; its batch is the conditional half."""
    taps = Taps(unet, probe.config.tap_kind)
    multiple = latent_multiple(unet.config)
    width = probe.config.time_embed_dim
    embedding = () if width is None else (TensorSpec("time_embedding", dtype, ("pictures", width)),)
    cells = multiple * probe.config.output_scale // taps.scales[-1]
    reading = TensorSpec("reading", dtype, _map_shape("pictures", probe.config.out_channels, cells))
    return Graph("probe", ProbeGraph(probe), (*_tap_specs(taps, "pictures", multiple, dtype), *embedding), (reading,))


def vae_decoder_graph(vae: AutoencoderKL, multiple: int, dtype: torch.dtype) -> Graph:
    """Return the decoder's graph. ``multiple`` is the UNet's ``latent_multiple``: sizes move in those steps."""
    config = vae.config
    latents = TensorSpec("latents", dtype, _map_shape("pictures", config["latent_channels"], multiple))
    pixels = TensorSpec("pixels", dtype, _map_shape("pictures", config["out_channels"], multiple * vae_factor(config)))
    return Graph("vae_decoder", VaeDecoderGraph(vae), (latents,), (pixels,))


def _map_shape(count: Count, channels: int, cells: int) -> tuple[int | str, ...]:
    """Return ``[count, channels, cells*rows, cells*columns]`` with one cell written without a factor."""
    return (count, channels, *(f"{cells}*{axis}" if cells > 1 else axis for axis in ("rows", "columns")))


def _step_inputs(
    config: Mapping[str, Any], text_length: int, multiple: int, dtype: torch.dtype
) -> tuple[TensorSpec, ...]:
    width = config["cross_attention_dim"]
    return (
        TensorSpec("sample", dtype, _map_shape("samples", config["in_channels"], multiple)),
        # float32 in every precision: schedulers may give fractional timesteps, and float16 cannot count to 999 exactly
        # enough for the sinusoids.
        TensorSpec("timestep", torch.float32, ("samples",)),
        TensorSpec("prompt_embeds", dtype, ("samples", text_length, width)),
    )


def _residual_specs(config: Mapping[str, Any], dtype: torch.dtype) -> tuple[TensorSpec, ...]:
    multiple = latent_multiple(config)
    found = residual_channels(config)
    names = [*(f"down_residual_{i}" for i in range(len(found) - 1)), "mid_residual"]
    return tuple(
        TensorSpec(name, dtype, _map_shape("samples", channels, multiple // scale))
        for name, (channels, scale) in zip(names, found, strict=True)
    )


def _tap_specs(taps: Taps, count: Count, multiple: int, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(f"tap_{i}", dtype, _map_shape(count, dim, multiple // scale))
        for i, (dim, scale) in enumerate(zip(taps.dims, taps.scales, strict=True))
    )
