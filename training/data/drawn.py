"""Batches drawn at random from what lies in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from training.seeds import mix_seed

Draw = Callable[[torch.Generator], dict[str, Any]]


class DrawnBatches:
    """Endless batches; each is a function of (seed, rank, position) alone, so that a resumed run repeats them.

    Args:
        draw: makes a batch; every random choice comes from the generator that it is given.
        seed: seed of the draws.
        rank: number of this process, so that each draws its own.
    """

    def __init__(self, draw: Draw, seed: int, rank: int = 0) -> None:
        self._draw, self._seed, self._rank = draw, seed, rank
        self._position = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        generator = torch.Generator()
        while True:
            generator.manual_seed(mix_seed(mix_seed(self._seed, self._rank), self._position))
            self._position += 1
            yield self._draw(generator)

    def state_dict(self) -> dict[str, int]:
        """Return how many batches were drawn."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after as many batches."""
        self._position = state["position"]
