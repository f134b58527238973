"""The weights that the ``torch`` backend keeps, and the modules that they make."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from diffusers.configuration_utils import ConfigMixin
from safetensors.torch import save_file
from torch import nn

from icexport.bundle.manifest import Manifest
from icexport.errors import BundleError
from icexport.graphs import stable_diffusion as graphs
from icexport.graphs.graph import Graph
from icexport.models import loading
from icexport.models.precision import precision
from icexport.models.probe import CONFIG_NAME, WEIGHTS_NAME, InnerControlProbe, ProbeConfig


def torch_module(graph: str, folder: Path, manifest: Manifest) -> nn.Module:
    """Return the module of one graph from the weights that ``save_torch`` wrote.

    Args:
        graph: name of the graph.
        folder: folder where its weights are.
        manifest: manifest of the bundle.

    Raises:
        BundleError: no module is known for this graph.
        CheckpointError: the weights are damaged.
    """
    dtype, configs = precision(manifest.dtype).torch, manifest.configs
    probe = ProbeConfig.from_dict(configs["probe"]) if "probe" in configs else None
    makers: dict[str, Callable[[], nn.Module]] = {
        "text_encoder": lambda: graphs.TextEncoderGraph(loading.load_text_encoder(folder, dtype)),
        "controlnet": lambda: graphs.ControlNetGraph(loading.load_controlnet(folder, dtype)),
        "unet": lambda: graphs.UNetGraph(loading.load_unet(folder, dtype), probe, manifest.train_timesteps),
        "probe": lambda: graphs.ProbeGraph(loading.load_probe(folder, dtype)),
        "vae_decoder": lambda: graphs.VaeDecoderGraph(loading.load_vae(folder, dtype)),
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
