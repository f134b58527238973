"""What a model is split into, one component in memory at a time."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import torch

from icexport.graphs.graph import Graph
from icexport.models.source import ModelSource


def split(source: ModelSource, dtype: torch.dtype) -> Iterator[Graph]:
    """Return the graphs of a model in ``dtype``, one component in memory at a time: a caller keeps none of them."""
    graphs: Iterator[Graph] = importlib.import_module(source.family.graphs).split(source, dtype)
    return graphs
