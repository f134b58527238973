"""How long work tells what it is doing."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called when a step begins and, by steps that know how far they are, while it goes on."""

    def __call__(self, step: str, share: float | None = None, /) -> None:
        """Tell.

        Args:
            step: name of the step; a new name ends the step before it.
            share: how much of it is done, 0 to 1; None: not known.
        """


def silent(_step: str, _share: float | None = None, /) -> None:
    """Tell nothing."""
