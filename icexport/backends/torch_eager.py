"""Eager PyTorch, the reference: weights as safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers.configuration_utils import ConfigMixin
from safetensors.torch import save_file

from icexport.errors import BundleError
from icexport.graphs import stable_diffusion as graphs
from icexport.graphs.graph import Graph
from icexport.models import loading
from icexport.models.dtypes import torch_dtype
from icexport.models.probe import CONFIG_NAME, WEIGHTS_NAME, InnerControlProbe, ProbeConfig

if TYPE_CHECKING:
    from torch import nn


def torch_module(graph: str, folder: Path, configs: Mapping[str, Mapping[str, Any]], dtype: str) -> nn.Module:
    """The module of one graph from the weights that ``save_torch`` wrote."""
    precision = torch_dtype(dtype)
    probe = ProbeConfig.from_dict(configs["probe"]) if "probe" in configs else None
    makers: dict[str, Callable[[], nn.Module]] = {
        "text_encoder": lambda: graphs.TextEncoderGraph(loading.load_text_encoder(folder, precision)),
        "controlnet": lambda: graphs.ControlNetGraph(loading.load_controlnet(folder, precision)),
        "unet": lambda: graphs.UNetGraph(loading.load_unet(folder, precision), probe),
        "probe": lambda: graphs.ProbeGraph(loading.load_probe(folder, precision)),
        "vae_decoder": lambda: graphs.VaeDecoderGraph(loading.load_vae(folder, precision)),
    }
    if graph not in makers:
        raise BundleError(f"No PyTorch module is known for the graph {graph!r}.")
    return makers[graph]()


def save_torch(graph: Graph, folder: Path) -> None:
    """Write the weights of a graph's model for the ``torch`` backend: safetensors and config, as diffusers does."""
    (model,) = [m for m in graph.module.children() if hasattr(m, "save_pretrained")]
    if isinstance(model, ConfigMixin):
        model.register_to_config(_name_or_path="")  # where the model lay on this machine is nobody's business
    if isinstance(model, InnerControlProbe):
        # Its own way adds metadata, which safetensors writes in random order: equal builds would have other hashes.
        folder.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / WEIGHTS_NAME)
        (folder / CONFIG_NAME).write_text(json.dumps(model.config.to_dict(), indent=2) + "\n", encoding="utf-8")
        return
    model.save_pretrained(folder)  # type: ignore[operator]
