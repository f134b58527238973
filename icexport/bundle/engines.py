"""From a bundle's graphs to running engines."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import ConfigMixin
from safetensors.torch import save_file

from engines.base import Engine, TensorSpec
from engines.registry import resolve
from icexport.bundle.store import Bundle
from icexport.errors import BundleError
from icexport.export.precision import torch_dtype
from icexport.models import graphs, loading
from icexport.models.probe import CONFIG_NAME, WEIGHTS_NAME, InnerControlProbe, ProbeConfig

if TYPE_CHECKING:
    from torch import nn


def specs(described: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    """The inverse of ``manifest.describe``."""
    return tuple(TensorSpec(d["name"], getattr(torch, d["dtype"]), tuple(d["shape"])) for d in described)


def load_engine(bundle: Bundle, graph: str, backend: str = "auto", device: str | torch.device = "cpu") -> Engine:
    """An engine for one graph of a bundle; the hash of every file that it reads is checked first.

    Args:
        bundle: the bundle.
        graph: name of the graph.
        backend: a backend's name or ``auto``, which takes the bundle's first one that can run here.
        device: ``cpu``, ``cuda`` or ``cuda:<i>``.

    Raises:
        BackendUnavailableError: the backend cannot run on the device.
        BundleError: the bundle has no such graph, or was not built for this backend.
        DamagedBundleError: a file was changed.
    """
    name = choose_backend(bundle, backend, device)
    entry = bundle.graph(graph)
    if name == "onnxruntime":
        from engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(graph, bundle.onnx(graph), device)
    from engines.torch_eager import TorchEngine

    files = [f for e in bundle.manifest.engines.values() if (e.graph, e.backend) == (graph, name) for f in e.files]
    if not files:
        raise BundleError(f"{bundle.path} has no {name} engine for {graph}. Build it again with --backend {name}.")
    folder = bundle.folder(PurePosixPath(files[0]).parent.as_posix())
    module = torch_module(graph, folder, bundle.manifest.configs, bundle.manifest.dtype)
    return TorchEngine(graph, module.to(device), specs(entry.inputs), specs(entry.outputs), device)


def choose_backend(bundle: Bundle, backend: str, device: str | torch.device) -> str:
    """The backend to run a bundle with.

    Raises:
        BundleError: the bundle was not built for the named backend; the command that does is named.
    """
    built = list(dict.fromkeys(entry.backend for entry in bundle.manifest.engines.values()))
    name = backend
    if backend == "auto":
        name = built[0] if len(built) == 1 else resolve("auto", device)
    if name not in built:
        raise BundleError(
            f"{bundle.path} was built for {', '.join(built) or 'no backend'}, not for {name}. Build it again with "
            f"--backend {name}."
        )
    return resolve(name, device)


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


def save_torch(graph: graphs.Graph, folder: Path) -> None:
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
