"""Sizes that follow from the configs alone; imports no torch, so that a cache hit of ``build`` stays quick."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def vae_factor(config: Mapping[str, Any]) -> int:
    """Return pixels per latent cell and side of an autoencoder with this config."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def size_multiple(unet_config: Mapping[str, Any], vae_config: Mapping[str, Any]) -> int:
    """Return the pixels that height and width must be multiples of, so that every UNet level halves evenly."""
    return vae_factor(vae_config) * latent_multiple(unet_config)


def latent_multiple(unet_config: Mapping[str, Any]) -> int:
    """Return what the latent's height and width must be multiples of."""
    return int(2 ** (len(unet_config["block_out_channels"]) - 1))


def residual_channels(unet_config: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """Return (channels, downsampling) of every ControlNet residual in order, the middle block's last."""
    channels, layers = unet_config["block_out_channels"], unet_config["layers_per_block"]
    layers = [layers] * len(channels) if isinstance(layers, int) else layers
    found = [(channels[0], 1)]
    for level, (width, count) in enumerate(zip(channels, layers, strict=True)):
        found += [(width, 2**level)] * count
        if level < len(channels) - 1:
            found.append((width, 2 ** (level + 1)))
    return (*found, (channels[-1], 2 ** (len(channels) - 1)))


def control_map_factor(controlnet_config: Mapping[str, Any]) -> int:
    """Return pixels of the control map per latent cell and side, by which a ControlNet's embedding shrinks it."""
    return int(2 ** (len(controlnet_config["conditioning_embedding_out_channels"]) - 1))
