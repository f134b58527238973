"""From a bundle's graphs to running engines."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import ConfigMixin
from safetensors.torch import save_file

from engines import registry
from engines.base import Engine, TensorSpec
from engines.registry import BACKENDS, resolve
from icexport.bundle.engine_store import EngineStore
from icexport.bundle.manifest import PROBE_FOLDER, EngineEntry, digest
from icexport.bundle.plans import PLAN_BACKENDS, PLAN_NAME
from icexport.bundle.store import Bundle
from icexport.errors import BundleError, UnsupportedOptionError
from icexport.export.precision import torch_dtype
from icexport.models import graphs, loading
from icexport.models.probe import CONFIG_NAME, WEIGHTS_NAME, InnerControlProbe, ProbeConfig

if TYPE_CHECKING:
    from torch import nn

    from engines.tensorrt.scratch import Scratch


logger = logging.getLogger(__name__)


def specs(described: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    """The inverse of ``manifest.describe``."""
    return tuple(TensorSpec(d["name"], getattr(torch, d["dtype"]), tuple(d["shape"])) for d in described)


def load_engine(
    bundle: Bundle,
    graph: str,
    backend: str = "auto",
    device: str | torch.device | None = None,
    scratch: Scratch | None = None,
) -> Engine:
    """An engine for one graph of a bundle; the hash of every file that it reads is checked first.

    Args:
        bundle: the bundle.
        graph: name of the graph.
        backend: a backend's name or ``auto``, which takes the bundle's best one that can run here.
        device: ``cpu``, ``cuda`` or ``cuda:<i>``; None: see ``default_device``.
        scratch: memory that TensorRT engines, which never run at the same time, share; None: one of its own.

    Raises:
        BackendUnavailableError: the backend cannot run on the device.
        BundleError: the bundle has no such graph, was not built for this backend, or its plan does not fit here.
        DamagedBundleError: a file was changed.
    """
    device = device or default_device(bundle, backend)
    name = choose_backend(bundle, backend, device)
    entry = bundle.graph(graph)
    if name == "onnxruntime":
        from engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(graph, bundle.onnx(graph), device)
    found = [(k, e) for k, e in bundle.manifest.engines.items() if (e.graph, e.backend) == (graph, name)]
    if not found or not found[0][1].files:
        raise BundleError(f"{bundle.path} has no {name} engine for {graph}. Build it again with --backend {name}.")
    key, engine = found[0]
    if name in PLAN_BACKENDS:
        from engines.tensorrt.engine import TensorRtEngine

        if reason := refusal(bundle, key, engine, device):
            raise BundleError(
                f"The {name} plan of {graph} in {bundle.path} cannot run here: {reason}. Build it for this machine "
                f"with: {rebuild_command(bundle, name)}"
            )
        bundle.verify(engine.files)
        plan = bundle.path / next(file for file in engine.files if file.endswith(PLAN_NAME))
        inputs, outputs = specs(entry.inputs), specs(entry.outputs)
        kernels = compiled_kernels(key) if name == "tensorrt-rtx" else None
        return TensorRtEngine(
            graph, plan, inputs, outputs, flavour=name, device=device, scratch=scratch, runtime_cache=kernels
        )
    from engines.torch_eager import TorchEngine

    folder = bundle.folder(PurePosixPath(engine.files[0]).parent.as_posix())
    module = torch_module(graph, folder, bundle.manifest.configs, bundle.manifest.dtype)
    return TorchEngine(graph, module.to(device), specs(entry.inputs), specs(entry.outputs), device)


def compiled_kernels(key: str) -> Path | None:
    """File for the kernels that TensorRT-RTX compiles for this GPU from a plan; None: no place to keep them."""
    folder = EngineStore().kernels
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("Kernels are compiled in every process, for %s cannot be written: %s", folder, error)
        return None
    return folder / f"{key}.cache"


def make_scratch(backend: str, device: str | torch.device) -> Scratch | None:
    """Memory that the engines of one pipeline share, for the backends whose engines take some."""
    if backend not in PLAN_BACKENDS:
        return None
    from engines.tensorrt.scratch import Scratch

    return Scratch(device)


def load_probe_kernels(bundle: Bundle, device: str | torch.device) -> Engine:
    """The probe on Triton kernels, from the weights in the bundle; takes the place of any backend's probe engine.

    Args:
        bundle: one with a probe.
        device: ``cuda`` or ``cuda:<i>``.

    Raises:
        UnsupportedOptionError: the device is no GPU, or the bundle is too old to hold the probe's weights.
        DamagedBundleError: a file was changed.
    """
    from engines.kernels.host import load_kernel
    from engines.torch_eager import TorchEngine
    from icexport.models.fused_probe import FusedProbe

    if torch.device(device).type != "cuda":
        raise UnsupportedOptionError(f"probe_kernels=True: the kernels run on a CUDA device, not on {device}.")
    load_kernel("residual_mix")  # a missing Triton must show now, not in the middle of a picture
    if f"{PROBE_FOLDER}/{CONFIG_NAME}" not in bundle.manifest.files:
        raise UnsupportedOptionError(f"{bundle.path} was built without the probe's weights. Build it again.")
    entry = bundle.graph("probe")
    probe = InnerControlProbe.from_pretrained(bundle.folder(PROBE_FOLDER)).eval()
    module = graphs.ProbeGraph(FusedProbe(probe.to(device, torch_dtype(bundle.manifest.dtype))))
    return TorchEngine("probe", module, specs(entry.inputs), specs(entry.outputs), device)


def built_backends(bundle: Bundle) -> tuple[str, ...]:
    """The backends that a bundle has engines for, in the order in which ``auto`` tries them."""
    built = {entry.backend for entry in bundle.manifest.engines.values()}
    return tuple(name for name in BACKENDS if name in built)


def default_device(bundle: Bundle, backend: str) -> str:
    """``cuda`` for a backend that runs nowhere else, and for a bundle that has no other; else ``cpu``."""
    names = built_backends(bundle) if backend == "auto" else (backend,)
    return "cuda" if names and set(names) <= set(PLAN_BACKENDS) else "cpu"


def choose_backend(bundle: Bundle, backend: str, device: str | torch.device) -> str:
    """The backend to run a bundle with: the named one, else the first of the bundle's that can use the device.

    Raises:
        BundleError: the bundle was not built for the named backend; the command that does is named.
        BackendUnavailableError: the backend, or every one of the bundle's, cannot use the device.
    """
    built = built_backends(bundle)
    if backend != "auto" and backend not in built:
        raise BundleError(
            f"{bundle.path} was built for {', '.join(built) or 'no backend'}, not for {backend}. Build it again with "
            f"--backend {backend}."
        )
    return resolve(backend, device, built)


def refusal(bundle: Bundle, key: str, engine: EngineEntry, device: str | torch.device) -> str:
    """Why a plan cannot be used on ``device``; empty if nothing speaks against it.

    A plan belongs to one graph with its weights, one version of its library, and one kind of GPU.
    """
    parts, graph = engine.report.get("made_from", {}), bundle.manifest.graphs[engine.graph]
    file = graph.plugin_file if parts.get("kernels") else graph.file
    weights = (bundle.manifest.files.get(file or ""), bundle.manifest.files.get(f"{file}.data", ""))
    if digest(parts) != key or (parts.get("graph"), parts.get("weights")) != weights:
        return "it was made from another graph or other weights than the bundle holds"
    installed = registry.check(engine.backend).version
    if installed != engine.version:
        return f"it was built by {engine.backend} {engine.version}, and {installed or 'none'} is installed"
    if engine.device == "portable":
        return ""
    name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    capability = f"sm_{major}{minor}"
    fits = (
        capability in engine.device.split("+")
        if engine.backend == "tensorrt-rtx"
        else f"{name} {capability}" == engine.device
    )
    return "" if fits else f"it was built for {engine.device}, and {device} is {name} ({capability})"


def rebuild_command(bundle: Bundle, backend: str) -> str:
    """The command that builds a bundle's engines again on this machine."""
    manifest, profile = bundle.manifest, bundle.manifest.profile
    source = manifest.source
    sizes = [("--shape", f"{h}x{w}") for h, w in profile.shapes] or [
        ("--height", str(profile.height)),
        ("--width", str(profile.width)),
    ]
    options = [
        ("--cond", manifest.condition["name"]),
        ("--model", source["model"]),
        *((f"--{part}", source[part]) for part in ("controlnet", "probe") if source[part]),
        ("--backend", backend),
        ("--dtype", manifest.dtype),
        *sizes,
        ("--batch-size", str(profile.batch)),
        ("--output", str(bundle.path)),
    ]
    return shlex.join(["icexport", "build", *(word for option in options for word in option)])


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
