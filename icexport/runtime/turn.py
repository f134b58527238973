"""One call at a time: diffusers keeps what belongs to a call in the pipeline and its scheduler."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from icexport.errors import UsageError


class Turn:
    """Lets the calls of several threads in one by one, in a ``with`` block."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    def __enter__(self) -> None:
        """Wait for the calls of other threads.

        Raises:
            UsageError: this thread is inside of a call already, as in a callback, and would wait for ever.
        """
        if self._owner == threading.get_ident():
            raise UsageError(
                "The pipeline was called from within its own call, whose state that would overwrite. Call a fork "
                "of it: pipe.fork()."
            )
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let the next one in."""
        if self._owner == threading.get_ident():  # not if the wait in ``others`` was interrupted
            self._owner = None
            self._lock.release()

    @contextmanager
    def others(self) -> Iterator[None]:
        """Let calls of other threads in while a part of this one goes on that needs no turn."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()
