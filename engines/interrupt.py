"""Long native calls that Ctrl-C can end."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

_LONG_S = 0.2
"""From here on, a person notices that Ctrl-C does nothing; handing a call over costs a thousandth of it."""


class Interruptible:
    """Runs long calls in a thread of its own, so that the main thread, which alone hears signals, hears them.

    Python looks for signals between two of its own instructions: a native call of minutes would end first. A call is
    taken to be long if the one before it was, and the first one is. Calls from other threads run where they are.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._long = True

    def __call__(self, run: Callable[[], None], stop: Callable[[], None]) -> None:
        """Run to the end.

        Args:
            run: the native call; its errors are raised.
            stop: makes a running call end soon, from another thread; called when the main thread is interrupted.

        Raises:
            KeyboardInterrupt: or whatever else a signal raises, once the call has ended.
        """
        started = perf_counter()
        if self._long and threading.current_thread() is threading.main_thread():
            self._hand_over(run, stop)
        else:
            run()
        self._long = perf_counter() - started > _LONG_S

    def _hand_over(self, run: Callable[[], None], stop: Callable[[], None]) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1)
        future = self._pool.submit(run)
        try:
            future.result()
        finally:
            # To its very end, however often one presses Ctrl-C: it still writes to memory that the caller holds.
            while not future.done():
                stop()
                with contextlib.suppress(KeyboardInterrupt):
                    future.exception()

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
