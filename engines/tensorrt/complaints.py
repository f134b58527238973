"""What a library says about a plan, kept for the error that has to tell the user."""

from __future__ import annotations

import logging
from collections import deque
from pathlib import Path

from engines.errors import EngineError

logger = logging.getLogger(__name__)

_KEPT_MESSAGES = 8


class Complaints:
    """Collects the errors that a library logs about one plan.

    Args:
        graph: name of the plan's graph, used in messages.
        plan: the plan's file.
        library: name of the library's Python module.
    """

    def __init__(self, graph: str, plan: Path, library: str) -> None:
        self.graph = graph
        self._plan = plan
        self._library = library
        self._reasons: deque[str] = deque(maxlen=_KEPT_MESSAGES)

    def note(self, severity: str, text: str) -> None:
        """Take a message of the library. Errors are kept for the exception, which is what says them to the user."""
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.add(text)
        logger.log(logging.WARNING if severity == "WARNING" else logging.DEBUG, "%s: %s", self.graph, text)

    def add(self, reason: str) -> None:
        """Keep a reason that the library did not log itself."""
        self._reasons.append(reason)

    def failure(self, what: str, fix: str) -> EngineError:
        """Make the error for a call to the library that failed, with all that was collected, and forget that."""
        reasons = "; ".join(dict.fromkeys(self._reasons)) or f"{self._library} gave no reason"
        self._reasons.clear()
        return EngineError(f"graph {self.graph!r} ({self._plan}): {what}: {reasons}. {fix}")
