"""What the trainer asks of a task and of data."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import Self

Batch = dict[str, Any]
"""Tensors on the CPU, and ``ids``: a list of the pictures' names."""


class Task(nn.Module):
    """What is trained and how: a module whose forward pass returns losses.

    Registered parameters are those that are trained: in float32, equal in every process, each with a gradient in every
    micro step. Networks that stay as they are must not be registered: hold them in a plain object (a dataclass), so
    that DDP, FSDP, the optimiser and checkpoints see the trained ones only.
    """

    name: str
    """Names the folder of the result."""

    def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the losses of one micro step.

        Args:
            batch: a batch on the CPU; the task moves what it needs to ``self.device``.
            generator: generator of the CPU, seeded anew for every micro step; every random choice must come from it.

        Returns:
            Scalars by name. ``loss`` is minimised; the others are logged, and may be missing in some steps.
        """
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write the trained networks as they are used afterwards; ``folder`` exists and is empty."""
        raise NotImplementedError

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Return numbers by name, and write pictures into ``folder``, which exists.

        Called in the first process only, on a copy that holds the averaged weights, in eval mode, without gradients,
        in the precision of training.
        """
        return {}

    def settings(self) -> dict[str, Any]:
        """Return what decides the computation (loss weights, taps, models), JSON-able: a run keeps to it."""
        return {}

    @property
    def device(self) -> torch.device:
        """Where the trained parameters are."""
        return next(self.parameters()).device

    def copy(self) -> Self:
        """Return a task on the CPU, in eval mode, whose parameters are its own.

        It shares every other attribute, frozen networks above all, so none of these may refer to a trained module.
        """
        shared = {id(value): value for name, value in vars(self).items() if name not in vars(nn.Module())}
        return copy.deepcopy(self, shared).requires_grad_(False).eval().to("cpu")


class Batches(Protocol):
    """One process's share of the data, without end."""

    def __iter__(self) -> Iterator[Batch]:
        """Return batches from the present position on."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position, JSON-able: after ``load_state_dict`` the next batch is the one that would have come."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position."""
