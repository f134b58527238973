"""The inputs on which a graph is judged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from icexport.graphs.graph import Graph, example_inputs
from icexport.graphs.profile import Profile

TIMESTEPS = (1.0, 500.0, 999.0)


@dataclass(frozen=True)
class Case:
    """One set of inputs: its name says size, guidance and timestep; the tensors are float32 or int64."""

    name: str
    inputs: dict[str, Tensor]


def cases(graph: Graph, profile: Profile, multiple: int) -> Iterator[Case]:
    """Yield the inputs on which a graph is judged; see the module's text."""
    has_time = any(spec.name == "timestep" for spec in graph.inputs)
    takes_guidance = any("samples" in spec.shape for spec in graph.inputs)
    for index, (pictures, height, width) in enumerate(profile.corners()):
        for guidance in (False, True) if takes_guidance else (False,):
            symbols = {
                "samples": 2 * pictures if guidance else pictures,
                "pictures": pictures,
                "prompts": pictures,
                "rows": height // multiple,
                "columns": width // multiple,
            }
            inputs = example_inputs(graph.inputs, symbols, seed=100 * index + guidance)
            for name in inputs:
                if "residual" in name and name != "residual_scale":
                    inputs[name] *= 0.1  # a trained ControlNet's residuals are small against the features they join
            label = f"{pictures}x{height}x{width}{' guided' if guidance else ''}"
            for timestep in TIMESTEPS if has_time else (None,):
                if timestep is not None:
                    inputs = inputs | {"timestep": torch.tensor(timestep)}
                yield Case(label if timestep is None else f"{label} t={timestep:.0f}", inputs)
