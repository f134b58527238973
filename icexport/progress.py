"""How long work tells what it is doing, and a thread that sees to it that something is told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from typing_extensions import Self


class Progress(Protocol):
    """Called when a step begins and, by steps that know how far they are, while it goes on."""

    def __call__(self, step: str, done: float | None = None, total: float = 1.0, /) -> None:
        """Tell.

        Args:
            step: name of the step; a new name ends the step before it.
            done: how much of it is done, 0 to ``total``; None: not known.
            total: how many parts it has; 1: ``done`` is a share.
        """


@runtime_checkable
class Expecting(Protocol):
    """What a ``Progress`` has beside its call if it wants to know how many steps there will be."""

    def expect(self, steps: int, /) -> None:
        """Hear, before the first step, how many there will be."""


def silent(_step: str, _done: float | None = None, _total: float = 1.0, /) -> None:
    """Tell nothing."""


def expect(progress: Progress, steps: int) -> None:
    """Tell how many steps there will be, unless ``progress`` is a plain function, which has no use for it."""
    if isinstance(progress, Expecting):
        progress.expect(steps)


class Ticker:
    """Calls a function from a thread again and again while nothing else is told.

    Use it as a context manager around the work, and ``telling`` around everything that is told meanwhile.

    Args:
        tell: called from the thread; never inside of ``telling``, and never after the end.
        seconds: how long nothing has been told when it is called.
    """

    def __init__(self, tell: Callable[[], None], seconds: float) -> None:
        self._tell, self._seconds = tell, seconds
        self._news, self._count, self._over = threading.Condition(), 0, False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self.telling():
            self._over = True
        self._thread.join()

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Keep the thread quiet in the block, and let its time begin anew behind it."""
        with self._news:
            self._count += 1
            yield
            self._news.notify()

    def _run(self) -> None:
        with self._news:
            while not self._over:
                count = self._count
                self._news.wait(self._seconds)
                if count == self._count:  # what `wait` returns may be out of date: it takes the lock again after it
                    self._tell()
