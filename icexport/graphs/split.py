"""What a model is split into, one component in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator

from icexport.graphs import stable_diffusion as sd
from icexport.graphs.graph import Graph
from icexport.models.dtypes import torch_dtype
from icexport.models.loading import ModelSource
from icexport.models.sizes import latent_multiple, vae_factor


def split(source: ModelSource, dtype: str) -> Iterator[Graph]:
    """The graphs of a model in ``dtype``, one component in memory at a time: a caller keeps none of them."""
    precision = torch_dtype(dtype)
    unet_config, vae_config = source.config("unet"), source.config("vae")
    length = source.full_config("text_encoder")["max_position_embeddings"]
    yield sd.text_encoder_graph(source.text_encoder(precision), precision)
    yield sd.controlnet_graph(source.controlnet_model(precision), length, vae_factor(vae_config), precision)
    probe = source.probe_model(precision)
    unet = source.unet(precision)
    yield sd.unet_graph(unet, length, probe.config if probe else None, precision)
    if probe:
        yield sd.probe_graph(probe, unet, precision)
    del unet, probe
    yield sd.vae_decoder_graph(source.vae(precision), latent_multiple(unet_config), precision)
