"""How long work tells what it is doing."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called when a step begins and, by steps that know how far they are, while it goes on."""

    def __call__(self, step: str, done: float | None = None, total: float = 1.0, /) -> None:
        """Tell.

        Args:
            step: name of the step; a new name ends the step before it.
            done: how much of it is done, 0 to ``total``; None: not known.
            total: how many parts it has; 1: ``done`` is a share.
        """


def silent(_step: str, _done: float | None = None, _total: float = 1.0, /) -> None:
    """Tell nothing."""
