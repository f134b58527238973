"""What a model is split into, one component in memory at a time."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import torch

from icexport.graphs.graph import Graph
from icexport.graphs.profile import Profile
from icexport.models.source import ModelSource


def split(source: ModelSource, dtype: torch.dtype, profile: Profile | None = None) -> Iterator[Graph]:
    """Return the graphs of a model in ``dtype``, one component in memory at a time: a caller keeps none of them.

    Args:
        source: the model.
        dtype: dtype of its weights.
        profile: sizes of a bundle, which may leave the length of prompts free.
    """
    graphs: Iterator[Graph] = importlib.import_module(source.family.graphs).split(source, dtype)
    if profile is None or profile.text is None:
        return graphs
    # Not a generator with a loop, whose variable would hold a graph while the next one is loaded.
    return map(lambda graph: graph.with_free_axis("prompt_embeds", 1, "tokens"), graphs)  # noqa: C417
