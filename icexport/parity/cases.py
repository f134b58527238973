"""The inputs on which a graph is judged.

At the smallest size, every timestep, guidance on and off, and the shortest and longest prompts where their length is
free; at each other size of ``Profile.corners``, one call with all of its rows. No module of a model looks from one
sample to another, so that two different samples, each in many rows, show as much as many different ones, and the
float32 reference computes these two only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engines.base import TensorSpec
from icexport.graphs.graph import Graph, example_inputs
from icexport.graphs.profile import Profile

TIMESTEPS = (1.0, 500.0, 999.0)

_APART, _STEPS = 250.0, 1000
"""A call can hold pictures that are at different steps: so much lies between two samples' timesteps, of so many."""

COUNTS = ("samples", "pictures", "prompts")
"""Symbols of the first axis, whose places are independent of each other."""


@dataclass(frozen=True)
class Case:
    """One set of inputs.

    Attributes:
        name: size, guidance and the first sample's timestep, for people.
        inputs: different samples; float32 or int64.
        rows: which of these samples is in each row of what an engine gets; empty: they are the rows.
    """

    name: str
    inputs: dict[str, Tensor]
    rows: tuple[int, ...] = ()

    def spread(self, tensors: dict[str, Tensor], counted: Collection[str]) -> dict[str, Tensor]:
        """Return the tensors of all rows, given those of the different samples.

        Args:
            tensors: inputs or outputs by name.
            counted: names of those whose first axis counts the samples.
        """
        if not self.rows:
            return tensors
        return {name: value[list(self.rows)] if name in counted else value for name, value in tensors.items()}


def counted(specs: Iterable[TensorSpec]) -> frozenset[str]:
    """Return the names of the tensors whose first axis counts independent samples."""
    return frozenset(spec.name for spec in specs if spec.shape and spec.shape[0] in COUNTS)


def cases(graph: Graph, profile: Profile, multiple: int) -> Iterator[Case]:
    """Yield the inputs on which a graph is judged; see the module's text.

    Cases that share their different samples share the dictionary ``inputs``, too.
    """
    has_time = any(spec.name == "timestep" for spec in graph.inputs)
    doubled = any("samples" in spec.shape for spec in graph.inputs)  # with guidance, each picture is two samples
    first, *others = sorted(profile.corners(), key=lambda corner: corner[0] * corner[1] * corner[2])
    made: dict[tuple[object, ...], dict[str, Tensor]] = {}
    lengths = profile.text if any("tokens" in spec.shape for spec in graph.inputs) else None

    def case(corner: tuple[int, int, int], *, guided: bool, timestep: float, tokens: int | None = None) -> Case:
        pictures, height, width = corner
        rows = 2 * pictures if guided else pictures
        different = min(rows, 2)
        sizes = {"rows": height // multiple, "columns": width // multiple}
        if lengths is not None:
            sizes["tokens"] = tokens or lengths.opt
        key = (different, height, width, guided, timestep, tokens)
        if key not in made:
            symbols = sizes | dict.fromkeys(COUNTS, different)
            made[key] = _inputs(graph, symbols, timestep, seed=len(made))
        name = f"{pictures}x{height}x{width}{' guided' if guided else ''}{f' t={timestep:.0f}' if has_time else ''}"
        name += f" {tokens} tokens" if tokens else ""
        return Case(name, made[key], _mixture(rows) if rows > different else ())

    low, middle, high = TIMESTEPS
    yield case(first, guided=doubled, timestep=middle)
    if has_time:
        yield from (case(first, guided=False, timestep=timestep) for timestep in (low, high))
    for corner in others:
        yield case(corner, guided=doubled, timestep=middle)
    for tokens in dict.fromkeys((lengths.min, lengths.max)) if lengths else ():
        yield case(first, guided=doubled, timestep=middle, tokens=tokens)


def _inputs(graph: Graph, symbols: dict[str, int], timestep: float, seed: int) -> dict[str, Tensor]:
    inputs = example_inputs(graph.inputs, symbols, seed)
    for name in inputs:
        if "residual" in name and name != "residual_scale":
            inputs[name] *= 0.1  # a trained ControlNet's residuals are small against the features they join
        if name == "timestep":
            inputs[name] = (timestep + _APART * torch.arange(symbols["samples"])) % _STEPS
    return inputs


def _mixture(rows: int) -> tuple[int, ...]:
    """Return 0 or 1 for each row without a period (Thue and Morse), so that no shift of the rows goes unseen."""
    return tuple(index.bit_count() % 2 for index in range(rows))
