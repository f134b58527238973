"""Engines that are open only while their part of a picture is made: for machines that are short of memory.

A picture is made in three phases: the prompt is encoded, the steps are drawn, the latents are decoded. The first call
of a phase closes the engines of the others. What it costs is loading them again for every picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from engines.base import Engine, as_device
from icexport.bundle.store import Bundle
from icexport.errors import BundleError
from icexport.graphs.graph import specs
from icexport.host import memory

PHASES = {"text_encoder": "encode", "controlnet": "draw", "unet": "draw", "probe": "draw", "vae_decoder": "decode"}
"""The phase in which each graph is needed."""


class Phases:
    """Opens the engines of a bundle when they are called, and closes those of other phases before.

    Args:
        bundle: the bundle.
        backend: name of the backend that runs it.
        device: ``cpu``, ``cuda`` or ``cuda:<i>``.
        load: opens the engine of a graph.
    """

    def __init__(
        self, bundle: Bundle, backend: str, device: str | torch.device, load: Callable[[str], Engine]
    ) -> None:
        self.bundle, self.backend, self.device = bundle, backend, as_device(device)
        self._load = load
        self._open: dict[str, Engine] = {}

    def engine(self, graph: str) -> PhaseEngine:
        """Return a stand-in for one graph's engine.

        Raises:
            BundleError: no phase is known for the graph.
        """
        if graph not in PHASES:
            raise BundleError(f"It is not known when the graph {graph!r} is needed.")
        return PhaseEngine(self, graph)

    def get(self, graph: str) -> Engine:
        """Return the open engine of a graph, after closing those that its phase does without."""
        others = [name for name in self._open if PHASES[name] != PHASES[graph]]
        for name in others:
            self.close(name)
        if others:
            memory.release()
        if graph not in self._open:
            self._open[graph] = self._load(graph)
        return self._open[graph]

    def close(self, graph: str) -> None:
        """Close the engine of a graph if it is open."""
        if graph in self._open:
            self._open.pop(graph).close()


class PhaseEngine:
    """The engine of one graph, open while its phase lasts; see ``engines.Engine``.

    Args:
        phases: knows what is open.
        graph: name of the graph.
    """

    def __init__(self, phases: Phases, graph: str) -> None:
        entry = phases.bundle.graph(graph)
        self.name, self.backend, self.device = graph, phases.backend, phases.device
        self.inputs, self.outputs = specs(entry.inputs), specs(entry.outputs)
        self._phases = phases

    def __call__(self, inputs: Mapping[str, Tensor], outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Run the graph once, see ``engines.Engine``; opened first if it is not open."""
        return self._phases.get(self.name)(inputs, outputs)

    def close(self) -> None:
        """Close the engine; the next call opens it again."""
        self._phases.close(self.name)
