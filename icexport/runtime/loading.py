"""The engines of a bundle as the models of a pipeline, and what is known of how they were loaded."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from icexport.backends import table
from icexport.backends.engines import load_engine
from icexport.backends.probe_kernels import load_probe_kernels
from icexport.bundle.manifest import Manifest
from icexport.bundle.store import Bundle
from icexport.errors import UnsupportedOptionError
from icexport.models.sizes import residual_channels, vae_factor
from icexport.runtime.components import EngineControlNet, EngineTextEncoder, EngineUNet, EngineVae
from icexport.runtime.needs import Needs
from icexport.runtime.phases import Phases
from icexport.runtime.rows import StepModels
from icexport.runtime.step import StepGraphs
from icexport.runtime.step_engine import StepEngine
from icexport.runtime.turn import Turn

if TYPE_CHECKING:
    from engines.base import Engine

_GRAPHS = {"vae": "vae_decoder", "text_encoder": "text_encoder", "unet": "unet", "controlnet": "controlnet"}
"""The graph that stands for each model of diffusers."""


@dataclass(frozen=True)
class Loaded:
    """How a bundle was loaded.

    Attributes:
        bundle: the bundle.
        backend: name of the backend that runs it.
        cuda_graph: whether a step is launched at once.
        probe_kernels: whether the probe runs on Triton kernels of ours.
        low_memory: whether engines are open only while they are needed.
        needs: what calls are checked against; None: nothing.
        probe: the probe's engine; None: the bundle has none.
        concurrent: whether several threads may call its engines at once.
        step_engine: draws pictures of all calls together; None: the engines take no single picture.
        step_graphs: launches a step at once; None: not wanted.
        process: id of the process that loaded it.
    """

    bundle: Bundle
    backend: str
    cuda_graph: bool
    probe_kernels: bool
    low_memory: bool
    needs: Needs | None
    probe: Engine | None
    concurrent: bool
    step_engine: StepEngine | None
    step_graphs: StepGraphs | None
    process: int = field(default_factory=os.getpid)

    def options(self) -> dict[str, Any]:
        """Return it as keyword arguments of ``from_pretrained``."""
        return {
            "backend": self.backend,
            "cuda_graph": self.cuda_graph,
            "probe_kernels": self.probe_kernels,
            "low_memory": self.low_memory,
            "preflight": self.needs is not None,
        }


def load_models(
    bundle: Bundle,
    backend: str,
    device: str | torch.device,
    cuda_graph: bool,
    probe_kernels: bool,
    low_memory: bool | None,
    needs: Needs | None,
) -> dict[str, Any]:
    """Return the models of a pipeline by their names in diffusers; the UNet's stand-in knows how they were loaded.

    Args:
        bundle: the bundle.
        backend: name of the backend that runs it.
        device: ``cpu``, ``cuda`` or ``cuda:<i>``.
        cuda_graph: whether a step is launched at once.
        probe_kernels: whether the probe runs on Triton kernels of ours.
        low_memory: whether engines are open only while they are needed; None: where memory is short.
        needs: what calls are checked against; None: nothing.

    Raises:
        UnsupportedOptionError: ``cuda_graph`` or ``probe_kernels`` is not possible here or with ``low_memory``.
        OutOfMemoryError: not even the smallest picture would fit into the free memory.
    """
    row = table.get(backend)
    if cuda_graph and not (row.capturable and torch.device(device).type == "cuda"):
        able = ", ".join(name for name, other in table.BACKENDS.items() if other.capturable)
        raise UnsupportedOptionError(
            f"cuda_graph=True: {backend} on {device} cannot be captured in a CUDA graph. Use one of {able} on a CUDA "
            "device, or leave it out."
        )
    if low_memory and (cuda_graph or probe_kernels):
        raise UnsupportedOptionError("low_memory=True closes engines that cuda_graph and probe_kernels need open.")
    low_memory = needs.choose_low_memory(bundle.manifest.profile, low_memory) if needs else bool(low_memory)
    scratch = row.scratch(device)
    load: Callable[[str], Engine] = functools.partial(
        load_engine, bundle, backend=backend, device=device, scratch=scratch
    )
    if low_memory:
        load = Phases(bundle, backend, device, load).engine
    engines = {name: load(graph) for name, graph in _GRAPHS.items()}
    probe = None
    if "probe" in bundle.manifest.graphs:
        probe = load_probe_kernels(bundle, device) if probe_kernels else load("probe")
    concurrent = row.concurrent and not (low_memory or cuda_graph or probe_kernels)
    step_graphs = StepGraphs(engines["controlnet"], engines["unet"]) if cuda_graph else None
    step_engine = _step_engine(bundle.manifest, engines, probe, needs, step_graphs)
    loaded = Loaded(
        bundle, backend, cuda_graph, probe_kernels, low_memory, needs, probe, concurrent, step_engine, step_graphs
    )
    return stand_ins(loaded, engines, Turn())


def _step_engine(
    manifest: Manifest,
    engines: Mapping[str, Engine],
    probe: Engine | None,
    needs: Needs | None,
    step_graphs: StepGraphs | None,
) -> StepEngine | None:
    profile, configs = manifest.profile, manifest.configs
    if profile.batch.min > 1:
        return None
    residuals = residual_channels(configs["controlnet"])
    models = StepModels(engines["controlnet"], engines["unet"], probe, residuals, profile.batch.max, step_graphs)
    return StepEngine(models, profile, vae_factor(configs["vae"]), needs)


def stand_ins(loaded: Loaded, engines: Mapping[str, Engine], turn: Turn) -> dict[str, Any]:
    """Return what diffusers takes for models, on engines that are open.

    Args:
        loaded: how they were loaded.
        engines: engines by diffusers' names of the models.
        turn: lets one call at a time use these stand-ins, which hold what belongs to a call.
    """
    configs = loaded.bundle.manifest.configs
    controlnet = EngineControlNet(engines["controlnet"], configs["controlnet"])
    unet = EngineUNet(engines["unet"], configs["unet"])
    unet.loaded, unet.turn = loaded, turn
    unet.step_graphs = controlnet.step_graphs = loaded.step_graphs
    return {
        "vae": EngineVae(engines["vae"], configs["vae"]),
        "text_encoder": EngineTextEncoder(engines["text_encoder"], configs["text_encoder"]),
        "unet": unet,
        "controlnet": controlnet,
    }
